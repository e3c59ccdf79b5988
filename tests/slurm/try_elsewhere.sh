#!/bin/bash
# Run the tests on another release of Debian in a folder, as root, with debootstrap:
#     bash tests/slurm/try_elsewhere.sh RELEASE [ARGUMENTS OF PYTEST]
# It takes about 3 GB there, and what is committed of this repository.
set -eu
release=${1:?is missing, such as trixie}
cd "$(dirname "$0")/../.."
folder=$(mktemp -d "/tmp/$release.XXXXXX")
chmod 755 "$folder"
trap 'rm -rf --one-file-system "$folder"' EXIT # what is mounted is gone by then
debootstrap --variant=minbase --include=ca-certificates,git,python3-venv \
    "$release" "$folder" >"$folder.log" || { tail "$folder.log"; exit 1; }
rm "$folder.log"
printf '%s\n' "127.0.0.1 localhost" "127.0.1.1 $(hostname)" >"$folder/etc/hosts" # as installed
git clone --quiet . "$folder/root/focal_mean"
# shellcheck disable=SC2016 # the variables are for the shell that unshare starts
unshare --mount bash -c '
    mount --rbind "$0" "$0"
    for place in proc sys dev etc/ssl/certs; do
        mount --rbind "/$place" "$0/$place"
    done
    cd "$0" && pivot_root . mnt && umount --lazy /mnt && cd /root/focal_mean
    CI=true exec bash -l tests/run.sh "$@"
' "$folder" "${@:2}"
