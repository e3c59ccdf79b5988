#!/bin/bash
# Put seff, which Debian and Ubuntu have only in the source of Slurm, into a folder:
#     bash get_seff.sh [FOLDER]
# FOLDER is .venv/bin unless given. It needs no root and leaves apt's settings alone. What
# seff needs to run is in packages: apt-get install libslurm-perl libslurmdb-perl
set -eu -o pipefail
seff=${1:-.venv/bin}/seff
work=$(mktemp -dt seff.XXXXXX)
exec 3>&2 &>"$work/log"
trap '[ $? = 0 ] || echo "$seff: not made: $(tail -n 1 "$work/log")" >&3
    rm -rf "$work"' EXIT
trap 'echo interrupted; exit 1' INT TERM
chmod 755 "$work" # root's apt-get fetches as another user
version=$(dpkg-query -W -f '${source:Package}=${source:Version}' slurm-client)
# The computer's own sources, in both formats, with their keys, but of source packages.
mkdir -p "$work"/{apt/sources.list.d,lists/partial,cache}
cp -rL /etc/apt/sources.list* "$work/apt"
find "$work/apt" -type f -exec \
    sed -Ei 's/^(Types:).*/\1 deb-src/I; s/^\s*deb\s/deb-src /' {} +
apt_get() { # it refuses what is not signed
    (cd "$work" && apt-get -qq -o Dir::Etc::sourcelist="$work/apt/sources.list" \
        -o Dir::Etc::sourceparts="$work/apt/sources.list.d" \
        -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" "$@")
}
apt_get update || true # Slurm's source may be there where another fails
if ! apt_get source --download-only --tar-only "$version"; then
    echo "apt-get has not got the source $version: see /etc/apt/sources.list*"
    exit 1
fi
# The line of "use lib" is for Perl modules from elsewhere, and warns.
tar -xOf "$work"/*.orig.tar.* --wildcards '*/contribs/seff/seff' |
    sed '/^use lib /d' >"$work/seff"
install "$work/seff" "$seff"
