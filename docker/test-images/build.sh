#!/usr/bin/env bash
# Builds images from Debian packages and this machine's Go alone, for machines that reach a Debian mirror but no image
# registry. Skips what is already built.
#
#   build.sh           takeout-test/mariadb:trixie, takeout-test/rabbitmq:trixie and takeout-test/go
#   build.sh newest    takeout-test/mysql:sid and takeout-test/rabbitmq:sid: whatever Debian unstable has that day
#
# Needs: Debian, root or sudo, debootstrap, Go, a Docker engine. To build again, docker rmi the images first.
set -euo pipefail
cd "$(dirname "$0")"

die() { echo "build.sh: $*" >&2; exit 1; }
built() { docker image inspect "$1" >/dev/null 2>&1; }

docker version >/dev/null 2>&1 || die "no Docker engine answers; start one, or set DOCKER_HOST"

sudo=
[ "$(id -u)" = 0 ] || sudo="sudo -n"

build_base() { # suite
  command -v debootstrap >/dev/null || [ -x /usr/sbin/debootstrap ] || die "debootstrap is missing: apt-get install debootstrap"
  # The mirror that this machine's apt uses is the one that this machine can reach.
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | head -1)
  [ -n "$mirror" ] || die "apt has no Debian package lists: run apt-get update; this needs a Debian host"
  root=$(mktemp -d)
  trap '$sudo rm -rf "$root"' EXIT
  echo "debootstrap $1"
  $sudo env PATH="/usr/sbin:/sbin:$PATH" \
    debootstrap --variant=minbase --include=ca-certificates "$1" "$root/debian" "$mirror" >"$root/log" 2>&1 ||
    { tail -20 "$root/log" >&2; die "debootstrap failed"; }
  # A mirror may be of another day than this machine's clock, and an unstable suite says for how long it is valid.
  echo 'Acquire::Check-Valid-Until "false";' | $sudo tee "$root/debian/etc/apt/apt.conf.d/99valid" >/dev/null
  $sudo tar -C "$root/debian" --exclude='./var/cache/apt/archives/*.deb' -c . | docker import - "takeout-test/debian:$1" >/dev/null
}

build() { # program, suite
  image=takeout-test/$1:$2
  if built "$image"; then
    echo "$image is already built"
    return
  fi
  base=takeout-test/debian:$2
  built "$base" || build_base "$2"
  echo "build $image"
  # The classic builder never asks a registry for FROM. The host's network reaches the host's mirror.
  log=$(mktemp)
  DOCKER_BUILDKIT=0 docker build --force-rm --network host \
    --build-arg http_proxy --build-arg https_proxy --build-arg BASE="$base" --tag "$image" "$1" >"$log" 2>&1 ||
    { tail -30 "$log" >&2; rm -f "$log"; die "$image could not be built"; }
  rm -f "$log"
}

case "${1:-}" in
"")
  build mariadb trixie
  build rabbitmq trixie
  ;;
newest)
  build mysql sid
  build rabbitmq sid
  exit
  ;;
*) die "unknown: $1" ;;
esac

# Go's own files and this machine's certificates are the build context, so that modules can be fetched from where
# this machine fetches them.
go_context() {
  goroot=$(go env GOROOT)
  tar -c --dereference -C "$PWD/go" Dockerfile -C /etc/ssl/certs ca-certificates.crt \
    -C "$(dirname "$goroot")" --transform "s,^$(basename "$goroot"),go," "$(basename "$goroot")"
}
if built takeout-test/go; then
  echo "takeout-test/go is already built"
else
  echo "build takeout-test/go"
  go_context | DOCKER_BUILDKIT=0 docker build --quiet --force-rm --tag takeout-test/go - >/dev/null ||
    die "takeout-test/go could not be built"
fi
