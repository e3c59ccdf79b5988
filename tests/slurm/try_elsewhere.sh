#!/bin/bash
# Run the tests on another release of Debian or Ubuntu, as root, with debootstrap:
#     bash tests/slurm/try_elsewhere.sh trixie
#     bash tests/slurm/try_elsewhere.sh noble http://archive.ubuntu.com/ubuntu gutsy
# Behind the release stand what debootstrap needs to know if that is Ubuntu. It takes about
# 3 GB in /tmp, and what is committed here. COMMAND=bash looks round there in place of it.
set -eu
release=${1:?is missing, such as trixie}
cd "$(dirname "$0")/../.."
folder=$(mktemp -d "/tmp/$release.XXXXXX")
chmod 755 "$folder"
trap 'rm -rf --one-file-system "$folder"' EXIT # what is mounted is gone by then
debootstrap --variant=minbase --include=ca-certificates,git,python3-venv \
    --components=main,universe "$release" "$folder" "${@:2}" >"$folder.log" ||
    { tail "$folder.log"; exit 1; }
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
    CI=true exec bash -lc "${COMMAND:-bash tests/run.sh}"
' "$folder"
