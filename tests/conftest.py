"""What several files of tests share: a Slurm cluster, fast runs, rasters."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tools

FOLDER = tools.ROOT / "tests" / "slurm"

# Runs a script for each case that it is sent, each time in a new process but without
# the half second that the imports take; answers with the exit code.
DRIVER = """
import ctypes, json, os, signal, sys
import rasterio, scipy.ndimage

for line in sys.stdin:
    case = json.loads(line)
    child = os.fork()
    if not child:
        for number in (1, 2):
            os.dup2(os.open(case["outputs"][number - 1], os.O_WRONLY), number)
        folder = case["folder"]
        if folder.startswith("/proc/"):  # on a disk that only another process sees
            process, folder = folder.split("/root", 1)
            for kind in ("user", "mnt"):
                namespace = os.open(f"{process}/ns/{kind}", os.O_RDONLY)
                assert ctypes.CDLL(None).setns(namespace, 0) == 0
        os.chdir(folder)
        os.environ |= case["environment"]
        code = open(sys.argv[1]).read()
        for old, new in case["changes"].items():
            code = code.replace(old, new)
        sys.argv[1:] = case["arguments"]
        signal.alarm(case["limit"])
        exec(code)
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that none is left in the end."""
    long = "test_slurm.py", "test_readme.py", "test_memory.py"
    items.sort(key=lambda item: item.path.name not in long)


@pytest.fixture(scope="session")
def cluster():
    """Start a cluster; give the environment variables with which programs find it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # not too long for Slurm
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


@pytest.fixture(scope="session")
def run_fast(tmp_path_factory):
    """Return a function that runs a script, without the time that its start takes."""
    outputs = tmp_path_factory.mktemp("outputs")
    drivers = {
        script: subprocess.Popen(
            [sys.executable, "-c", DRIVER, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"SLURM_CPUS_PER_TASK": "2"},
        )
        for script in tools.SCRIPTS
    }

    def run_case(script, *arguments, cwd, changes=None, **environment):
        changes = changes or {}  # of the script's text
        assert all(text in tools.MULTI.read_text() for text in changes)
        driver = drivers[script]
        texts = [outputs / f"{script.stem}.{number}" for number in (1, 2)]
        for text in texts:
            text.write_text("")
        case = {
            "arguments": list(map(str, arguments)),
            "outputs": list(map(str, texts)),
            "folder": str(cwd),
            "environment": environment,
            "changes": changes,
            "limit": tools.LIMIT,
        }
        driver.stdin.write(json.dumps(case) + "\n")
        driver.stdin.flush()
        code = int(driver.stdout.readline())
        stdout, stderr = (text.read_text() for text in texts)
        return subprocess.CompletedProcess(case, code, stdout, stderr)

    yield run_case
    for driver in drivers.values():
        driver.communicate()


@pytest.fixture
def run_both(run_fast, tmp_path):
    """Return a function that runs the scripts, each in a folder of its own."""

    def run_two(*arguments):
        for script in tools.SCRIPTS:
            cwd = tmp_path / script.stem
            cwd.mkdir(exist_ok=True)
            yield cwd, run_fast(script, *arguments, cwd=cwd)

    return run_two


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Return a small raster of random numbers."""
    values = np.random.default_rng(0).random((1, 200, 150), np.float32)
    return tools.write_raster(tmp_path_factory.mktemp("small") / "small.tif", values)


@pytest.fixture
def public():
    """Return a folder that all users reach, which tmp_path is not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
