#!/bin/bash
# Put seff into .venv/bin. Debian and Ubuntu have it only in the source of Slurm. It needs no
# root, and what seff needs to run: apt-get install libslurm-perl libslurmdb-perl
set -eu -o pipefail
target=$PWD/.venv/bin
work=$(mktemp -dt seff.XXXXXX)
trap 'rm -rf "$work"' EXIT
cd "$work"
# The computer's own sources, in both formats, with their keys, but of source packages.
mkdir -p sources/sources.list.d lists/partial cache
cp -rL /etc/apt/sources.list* sources
find sources -type f -exec sed -Ei 's/^(Types:).*/\1 deb-src/I; s/^\s*deb\s/deb-src /' {} +
options=(-qq -o APT::Sandbox::User=root -o Dir::Etc::sourcelist="$work/sources/sources.list"
    -o Dir::Cache="$work/cache" -o Dir::Etc::sourceparts="$work/sources/sources.list.d"
    -o Dir::State::lists="$work/lists")
apt-get "${options[@]}" update || true # Slurm's source may be there where another fails
version=$(dpkg-query -W -f '${source:Package}=${source:Version}' slurm-client)
apt-get "${options[@]}" source --download-only --tar-only "$version"
# The line of "use lib" is for Perl modules from elsewhere, and warns.
tar -xOf ./*.orig.tar.* --wildcards '*/contribs/seff/seff' | sed '/^use lib /d' >seff
install seff "$target"
