#!/bin/bash
# Stop a Slurm cluster that start.sh started, end its jobs and remove its folder:
#     bash tests/slurm/stop.sh FOLDER
set -u
folder=${1:?is missing: it is in the last line that start.sh printed}
folder=${folder%/}
if [ ! -d "$folder/state" ]; then
    echo "$folder: start.sh made no such folder" >&2
    exit 1
fi
trap '' INT TERM # a second Ctrl-C would leave the rest running
export SLURM_CONF=$folder/slurm.conf
daemons=$(cat "$folder"/*.pid 2>/dev/null)

left() { # which daemons run: a number could be another process's by now
    for pid in $daemons; do
        ! grep -qszxF "SLURM_CONF=$SLURM_CONF" "/proc/$pid/environ" || echo "$pid"
    done
}
if left | grep -qxf "$folder/slurmctld.pid" 2>/dev/null && timeout 10 scancel --user="$(id -un)" 2>/dev/null; then
    for _ in {1..400}; do # Slurm kills after 30 seconds what does not end by itself
        [ -n "$(timeout 10 squeue -h)" ] || break
        sleep 0.1
    done
fi
for signal in TERM KILL; do
    for pid in $(left); do kill -s $signal "$pid"; done
    for _ in {1..100}; do
        [ -n "$(left)" ] || break 2
        sleep 0.1
    done
done
rm -rf "$folder"
