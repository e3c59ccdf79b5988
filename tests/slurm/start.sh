#!/bin/bash
# Start a Slurm cluster of three nodes on this computer, without root:
#     bash tests/slurm/start.sh [PYTHON]
# PYTHON is what the module geo-env gives, .venv/bin/python unless given. Needs Debian's
# packages slurm-wlm and lmod; exits with 77 where they are missing.
# Who is logged in on this computer can start jobs there in your name: stop it after use.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${1:-${here%/tests/slurm}/.venv/bin/python}
PATH=$PATH:/usr/sbin # where the daemons are, for other users than root
if ! type -P slurmctld slurmd sbatch >/dev/null || ! bash -lc 'type module' &>/dev/null
then
    echo "Slurm or Lmod is missing: apt-get install slurm-wlm lmod" >&2
    exit 77
fi

folder=$(mktemp -d "${TMPDIR:-/tmp}/slurm.XXXXXX")
trap 'tail "$folder"/*.err >&2; bash "$here/stop.sh" "$folder"' EXIT # if it fails
mkdir "$folder"/{state,modules,c1,c2,c3}
printf 'prepend_path("PATH", "%s")\n' "$(dirname "$python")" >"$folder/modules/geo-env.lua"
ports=$("$python" -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
print(*(free.getsockname()[1] for free in sockets))')
read -r slurmctld c1 c2 c3 <<<"$ports"
sed "s|@folder@|$folder|; s|@user@|$(id -un)|; s|@slurmctld@|$slurmctld|
    s|@c1@|$c1|; s|@c2@|$c2|; s|@c3@|$c3|" "$here/slurm.conf" >"$folder/slurm.conf"
export SLURM_CONF=$folder/slurm.conf

daemon() { # its name, its program and arguments; Ctrl-C does not reach it
    setsid "${@:2}" -D -f "$SLURM_CONF" &>"$folder/$1.err" </dev/null &
    echo $! >"$folder/$1.pid"
}
daemon slurmctld slurmctld
for node in c1 c2 c3; do
    daemon $node slurmd -N $node
done
for _ in {1..300}; do
    [ "$(timeout 5 sinfo -h -p serial -o %D%t 2>/dev/null)" != 3idle ] || break
    sleep 0.1
done
[ "$(timeout 5 sinfo -h -p serial -o %D%t)" = 3idle ]
trap - EXIT
echo "Slurm has started. Tell your terminal where, with these two lines:"
echo "export SLURM_CONF=$SLURM_CONF"
echo "export MODULEPATH=$folder/modules"
echo "Then sbatch, squeue and the others work here. To stop Slurm and its jobs:"
echo "bash $here/stop.sh $folder; unset SLURM_CONF MODULEPATH"
