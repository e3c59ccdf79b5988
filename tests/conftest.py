"""The Slurm cluster that the tests of the batch files and of README share."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tools

FOLDER = tools.ROOT / "tests" / "slurm"


@pytest.fixture(scope="session")
def cluster():
    """Start a cluster; give the environment variables with which programs find it."""
    with tempfile.TemporaryDirectory() as place:
        # A login shell reads what the user has at home: here nothing.
        variables = os.environ | {"TMPDIR": place, "HOME": place}
        start = ["bash", FOLDER / "start.sh", sys.executable]
        try:
            started = subprocess.run(
                start, env=variables, capture_output=True, text=True, check=False
            )
            if started.returncode == 77 and "CI" not in os.environ:
                pytest.skip(started.stderr)
            assert started.returncode == 0, started.stderr
            yield variables | dict(re.findall(r"export (\w+)=(.*)", started.stdout))
        finally:  # also after Ctrl-C while it starts; a second one has to wait
            interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
            for folder in Path(place).glob("slurm.*"):
                subprocess.run(["bash", FOLDER / "stop.sh", folder], check=False)
            signal.signal(signal.SIGINT, interrupt)
            assert not list(Path(place).glob("slurm.*"))
            assert tools.processes(f"SLURM_CONF={place}/") == []
