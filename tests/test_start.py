"""The Slurm to try it on starts on computers of all kinds, or says why not."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tools

# Takes the file $0 for /etc/hosts, lets nobody run the program $1, runs the rest.
MOUNTS = """
mount --bind "$0" /etc/hosts || exit 78
[ ! -e "$1" ] || mount --bind /dev/null "$1" || exit 78
exec "${@:2}"
"""
# In folder $1: starts Slurm, runs a job, and stops it as the last line says.
SESSION = """
cd "$1" || exit
bash "$2/start.sh" "$3" >started || exit $(($? == 77 ? 77 : 2))
eval "$(grep "^export" started)"
sbatch --wait --output=job.txt --wrap=hostname && srun hostname >step.txt
cp "$SLURM_CONF" .
for port in $(grep -o "Port=[0-9]*" slurm.conf); do
    for address in 127.0.0.1 127.0.0.2; do
        ! : <>"/dev/tcp/$address/${port#*=}" || echo "$address" >>reached
    done
done 2>/dev/null
eval "$(tail -n 1 started)"
"""


def start(folder, **environment):
    """Run start.sh, which must not start Slurm, within 30 seconds; return what it said."""
    command = ["bash", tools.ROOT / "tests/slurm/start.sh", sys.executable]
    begin = time.monotonic()
    done = subprocess.run(
        command,
        env=os.environ | {"TMPDIR": str(folder)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and time.monotonic() - begin < 30, done
    if done.returncode == 77 and "CI" not in os.environ:
        pytest.skip(done.stderr)
    return done.stderr


@pytest.mark.parametrize(
    ("address", "missing"),
    [
        ("127.0.0.1", ""),
        ("127.0.1.1", ""),
        ("192.0.2.9", ""),
        ("#", "/usr/sbin/mariadbd"),
    ],
)
def test_whatever_the_hosts_file_says(tmp_path, address, missing):
    """It listens on 127.0.0.1 only, and its folder is short, wherever TMPDIR is.

    Without the programs that keep records it starts, too, and says that in one line.
    """
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
    place = tmp_path / ("long" * 20)
    place.mkdir()
    command = ["bash", "-c", MOUNTS, hosts, missing]
    if os.geteuid() == 0:
        command = ["unshare", "--mount", *command]
    else:  # who is root in a namespace is not for what Slurm does
        command = ["unshare", "--mount", "--map-root-user", *command]
        ids = f"--map-user={os.geteuid()}", f"--map-group={os.getegid()}"
        command += ["unshare", *ids]
    scripts = tmp_path / "my clone"
    shutil.copytree(tools.ROOT / "tests/slurm", scripts)
    command += ["bash", "-c", SESSION, "bash", place, scripts]
    done = subprocess.run(
        [*command, sys.executable],
        env=os.environ | {"TMPDIR": str(place), "PLACE": str(place)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode in (1, 77, 78) and "CI" not in os.environ:
        pytest.skip(f"needs Slurm and unshare: {done.stderr.strip()}")
    assert done.returncode == 0, done
    said = (place / "started").read_text().splitlines()
    assert ("No records" in said[0], len(said)) == (missing != "", 6 if missing else 5)
    name = f"{socket.gethostname()}\n"
    assert (place / "job.txt").read_text() == (place / "step.txt").read_text() == name
    ports = set(re.findall(r"Port=(\d+)", (place / "slurm.conf").read_text()))
    assert (place / "reached").read_text().split() == ["127.0.0.1"] * len(ports)
    assert tools.processes(f"PLACE={place}\0") == []


def test_failed_start_says_why(tmp_path):
    slurmctld = tmp_path / "slurmctld"
    slurmctld.write_text("#!/bin/sh\necho no such luck >&2\nexit 3\n")
    slurmctld.chmod(0o755)
    said = start(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert "no such luck" in said
    assert "Slurm has not started" in said.splitlines()[-1]
    assert list(Path(tmp_path).iterdir()) == [slurmctld]
    assert tools.processes(f"TMPDIR={tmp_path}\0") == []
