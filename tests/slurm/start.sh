#!/bin/bash
# Start a Slurm cluster of three nodes on this computer, without root:
#     bash tests/slurm/start.sh [PYTHON]
# PYTHON is what the module geo-env gives, .venv/bin/python unless given. Exits with 77
# where a package is missing.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${1:-${here%/tests/slurm}/.venv/bin/python}
PATH=$PATH:/usr/sbin # where the daemons are, for other users than root
# The daemons listen where the name of the computer leads: it has to be here for them.
as_localhost=(env NSS_WRAPPER_HOSTNAME=localhost LD_PRELOAD=libnss_wrapper.so)
if ! { type -P slurmctld slurmd sbatch munged slurmdbd mariadbd && bash -lc 'type module'; } \
    &>/dev/null || [ "$("${as_localhost[@]}" hostname 2>/dev/null)" != localhost ]; then
    echo "Something is missing: apt-get install slurm-wlm munge slurmdbd mariadb-server-core" \
        "lmod libnss-wrapper" >&2
    exit 77
fi

! [[ ${TMPDIR-} =~ .{71} ]] || TMPDIR=/tmp # a socket's path has at most 107 characters
folder=$(mktemp -dt slurm.XXXXXX)
trap 'set +e; tail -v -n 5 "$folder"/*.err >&2
    echo "Slurm has not started: see the last lines of its programs here" >&2
    bash "$here/stop.sh" "$folder"' EXIT
mkdir -p "$folder"/{state,modules,c1,c2,c3,database/slurm_acct_db}
printf 'prepend_path("PATH", "%s")\n' "$(dirname "$python")" >"$folder/modules/geo-env.lua"
head -c 1024 /dev/urandom >"$folder/munge.key"
ports=() # free, and below 32768, from where on other programs' connections take theirs
for ((port = 10000 + $$ * 5 % 20000; ${#ports[@]} < 5; port++)); do
    (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || ports+=("$port")
done
read -r slurmctld slurmdbd c1 c2 c3 <<<"${ports[*]}"
for name in slurm.conf slurmdbd.conf cgroup.conf; do
    sed "s|@folder@|$folder|; s|@user@|$(id -un)|; s|@slurmctld@|$slurmctld|
        s|@slurmdbd@|$slurmdbd|; s|@c1@|$c1|; s|@c2@|$c2|; s|@c3@|$c3|" \
        "$here/$name" >"$folder/$name"
done
chmod 600 "$folder"/{slurmdbd.conf,munge.key} # else they are refused
export SLURM_CONF=$folder/slurm.conf MYSQL_UNIX_PORT=$folder/mysql.socket

daemon() { # its name, its program and arguments; Ctrl-C does not reach it
    setsid "${@:2}" &>"$folder/$1.err" </dev/null & pids+=($!)
    echo $! >"$folder/$1.pid"
}
wait_for() { # that a command succeeds, not for long, and not if a daemon has ended
    until timeout 5 "$@" &>/dev/null; do
        [ $SECONDS -lt 60 ] && [ "$(jobs -pr | wc -l)" = ${#pids[@]} ] || exit 1
        sleep 0.1
    done
}
daemon munge munged -F -f -S "$folder/munge.socket" --key-file="$folder/munge.key" \
    --seed-file="$folder/munge.seed" --pid-file="$folder/munge.pid" --origin=127.0.0.1
wait_for test -S "$folder/munge.socket"
daemon mariadb mariadbd --no-defaults --user="$(id -un)" --skip-networking \
    --datadir="$folder/database" --socket="$MYSQL_UNIX_PORT" \
    --skip-grant-tables --debug-no-sync --innodb-log-file-size=4M
wait_for test -S "$MYSQL_UNIX_PORT"
daemon slurmdbd "${as_localhost[@]}" slurmdbd -D
wait_for sacctmgr -n show cluster
daemon slurmctld "${as_localhost[@]}" slurmctld -D -f "$SLURM_CONF"
for node in c1 c2 c3; do
    daemon $node "${as_localhost[@]}" slurmd -D -f "$SLURM_CONF" -N $node
done
wait_for bash -c "sinfo -h -p serial -o %D%t | grep -x 3idle"
sed -i /^CommunicationParameters/d "$SLURM_CONF" # srun must not listen where they do
trap - EXIT
echo "Slurm has started. Tell your terminal where, with these two lines:
export SLURM_CONF=$SLURM_CONF
export MODULEPATH=$folder/modules
Then sbatch, squeue and the others work here. To stop Slurm and its jobs:
bash $(printf %q "$here/stop.sh") $folder; unset SLURM_CONF MODULEPATH"
