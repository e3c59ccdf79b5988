"""The Slurm to try it on starts on computers of all kinds, or says why not."""

import os
import shutil
import socket
import sys

import pytest
import runs

# Takes the file $0 for /etc/hosts, and runs the rest.
MOUNT = 'mount --bind "$0" /etc/hosts || exit 77; exec "$@"'
# In folder $0: starts Slurm, runs a job, and stops it as the last line says.
SESSION = """
cd "$0" || exit
bash "my clone/start.sh" "$1" >started || exit
eval "$(grep "^export" started)"
sbatch --output=job.txt --wrap=hostname && srun hostname >step.txt
until [ -s job.txt ]; do sleep 0.1; done
for port in $(grep -o "Port=[0-9]*" "$SLURM_CONF"); do
    for address in 127.0.0.1 127.0.0.2; do
        ! : <>"/dev/tcp/$address/${port#*=}" || echo "$address" >>reached
    done
done 2>/dev/null
eval "$(tail -n 1 started)"
"""


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1", "192.0.2.9", "#"])
def test_whatever_the_hosts_file_says(tmp_path, address):
    """Of this computer. Slurm listens on 127.0.0.1 only, and works in a long folder, too."""
    place = tmp_path / ("long" * 20)
    shutil.copytree(runs.ROOT / "tests/slurm", place / "my clone")
    hosts = f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n"
    (place / "hosts").write_text(hosts)
    command = ["unshare", "--mount", "bash", "-c", MOUNT, place / "hosts"]
    if os.geteuid():  # who is root in a namespace is not for what Slurm does
        command.insert(2, "--map-root-user")
        ids = f"--map-user={os.geteuid()}", f"--map-group={os.getegid()}"
        command += ["unshare", *ids]
    command += ["bash", "-c", SESSION, place, sys.executable]
    environment = os.environ | {"TMPDIR": str(place), "PLACE": str(place)}
    done = runs.run_or_skip(command, env=environment)
    assert done.returncode == 0, done.stderr
    assert len((place / "started").read_text().splitlines()) == 5
    outputs = [(place / name).read_text() for name in ("job.txt", "step.txt")]
    assert outputs == [f"{socket.gethostname()}\n"] * 2
    reached = (place / "reached").read_text().split()
    assert reached == ["127.0.0.1"] * 5  # one for each daemon
    assert runs.processes(f"PLACE={place}\0") == []
