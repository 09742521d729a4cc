#!/usr/bin/env bash
# Builds the images takeout-test/mariadb:10.11 and takeout-test/rabbitmq:3.10 from Debian packages alone,
# for machines that reach a Debian mirror but no image registry. Skips what is already built.
#
# Needs: Debian, root or sudo, debootstrap, a Docker engine. To build again, docker rmi the images first.
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
