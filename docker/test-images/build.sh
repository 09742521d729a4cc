#!/usr/bin/env bash
# Builds the images takeout-test/mariadb:10.11, takeout-test/rabbitmq:3.10 and takeout-test/go from Debian packages
# and this machine's Go alone, for machines that reach a Debian mirror but no image registry. Skips what is already
# built.
#
# Needs: Debian, root or sudo, debootstrap, Go, a Docker engine. To build again, docker rmi the images first.
set -euo pipefail
cd "$(dirname "$0")"

suite=bookworm
base=takeout-test/debian:$suite

die() { echo "build.sh: $*" >&2; exit 1; }
built() { docker image inspect "$1" >/dev/null 2>&1; }

docker version >/dev/null 2>&1 || die "no Docker engine answers; start one, or set DOCKER_HOST"

sudo=
[ "$(id -u)" = 0 ] || sudo="sudo -n"

build_base() {
  command -v debootstrap >/dev/null || [ -x /usr/sbin/debootstrap ] || die "debootstrap is missing: apt-get install debootstrap"
  # The mirror that this machine's apt uses is the one that this machine can reach.
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | head -1)
  [ -n "$mirror" ] || die "apt has no Debian package lists: run apt-get update; this needs a Debian host"
  root=$(mktemp -d)
  trap '$sudo rm -rf "$root"' EXIT
  echo "debootstrap $suite"
  $sudo env PATH="/usr/sbin:/sbin:$PATH" \
    debootstrap --variant=minbase --include=ca-certificates "$suite" "$root/debian" "$mirror" >"$root/log" 2>&1 ||
    { tail -20 "$root/log" >&2; die "debootstrap failed"; }
  $sudo tar -C "$root/debian" --exclude='./var/cache/apt/archives/*.deb' -c . | docker import - "$base" >/dev/null
}

build() { # image, directory
  if built "$1"; then
    echo "$1 is already built"
    return
  fi
  built "$base" || build_base
  echo "build $1"
  # The classic builder never asks a registry for FROM. The host's network reaches the host's mirror.
  log=$(mktemp)
  DOCKER_BUILDKIT=0 docker build --force-rm --network host \
    --build-arg http_proxy --build-arg https_proxy --build-arg BASE="$base" --tag "$1" "$2" >"$log" 2>&1 ||
    { tail -30 "$log" >&2; rm -f "$log"; die "$1 could not be built"; }
  rm -f "$log"
}

build takeout-test/mariadb:10.11 mariadb
build takeout-test/rabbitmq:3.10 rabbitmq

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
