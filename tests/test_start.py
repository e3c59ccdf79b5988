"""The Slurm to try it on starts on computers of all kinds, or says why not."""

import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
import tools

# What /etc/hosts says of this computer, and a daemon that it does not have.
COMPUTERS = {"127.0.0.1": "", "127.0.1.1": "", "192.0.2.9": "", "#": "mariadbd"}
# Takes the file $0 for /etc/hosts, lets nobody run the program $1, runs the rest.
MOUNTS = """
mount --bind "$0" /etc/hosts || exit 78
[ ! -f "/usr/sbin/$1" ] || mount --bind /dev/null "/usr/sbin/$1" || exit 78
exec "${@:2}"
"""
# In folder $1: starts Slurm, runs a job, and stops it as the last line says.
SESSION = """
cd "$1" || exit
bash "$2/start.sh" "$3" >started || exit $(($? == 77 ? 77 : 2))
eval "$(grep "^export" started)"
sbatch --output=job.txt --wrap=hostname && srun hostname >step.txt
until [ -s job.txt ]; do sleep 0.1; done
cp "$SLURM_CONF" .
for port in $(grep -o "Port=[0-9]*" slurm.conf); do
    for address in 127.0.0.1 127.0.0.2; do
        ! : <>"/dev/tcp/$address/${port#*=}" || echo "$address" >>reached
    done
done 2>/dev/null
eval "$(tail -n 1 started)"
"""


def test_whatever_the_hosts_file_says(tmp_path):
    """It listens on 127.0.0.1 only, with a short folder, and without records, too."""
    sessions = []
    for address, missing in COMPUTERS.items():
        place = tmp_path / f"{address}{'long' * 20}"
        hosts, scripts = place / "hosts", place / "my clone"
        shutil.copytree(tools.ROOT / "tests/slurm", scripts)
        hosts.write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
        command = ["unshare", "--mount", "bash", "-c", MOUNTS, hosts, missing]
        if os.geteuid():  # who is root in a namespace is not for what Slurm does
            command.insert(2, "--map-root-user")
            ids = f"--map-user={os.geteuid()}", f"--map-group={os.getegid()}"
            command += ["unshare", *ids]
        session = subprocess.Popen(
            [*command, "bash", "-c", SESSION, "bash", place, scripts, sys.executable],
            env=os.environ | {"TMPDIR": str(place), "PLACE": str(place)},
            stderr=subprocess.PIPE,
            text=True,
        )
        sessions.append((place, missing, session))
    for *_, session in sessions:
        session.wait(tools.LIMIT)
    for place, missing, session in sessions:
        error = session.stderr.read()
        if session.returncode in (1, 77, 78) and "CI" not in os.environ:
            pytest.skip(f"needs Slurm and unshare: {error.strip()}")
        assert session.returncode == 0, (place, error)
        first, *others = (place / "started").read_text().splitlines()
        said = "No records" in first, len(others)
        assert said == ((True, 5) if missing else (False, 4)), place
        outputs = [(place / name).read_text() for name in ("job.txt", "step.txt")]
        assert outputs == [f"{socket.gethostname()}\n"] * 2, place
        ports = set(re.findall(r"Port=(\d+)", (place / "slurm.conf").read_text()))
        reached = (place / "reached").read_text().split()
        assert reached == ["127.0.0.1"] * len(ports), place
        assert tools.processes(f"PLACE={place}\0") == []


def test_failed_start_says_why(tmp_path):
    slurmd = tmp_path / "slurmd"
    slurmd.write_text("#!/bin/sh\necho no such luck >&2\nexit 3\n")
    slurmd.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", tools.ROOT / "tests/slurm/start.sh", sys.executable],
        env=os.environ | {"TMPDIR": str(tmp_path), "PATH": path},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if done.returncode == 77 and "CI" not in os.environ:
        pytest.skip(done.stderr)
    assert done.returncode != 0 and "no such luck" in done.stderr, done
    assert "Slurm has not started" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [slurmd]
    assert tools.processes(f"TMPDIR={tmp_path}\0") == []
