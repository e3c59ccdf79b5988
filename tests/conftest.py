"""What several files of tests share: a Slurm cluster, fast runs, rasters."""

import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import rasters
import runs

SLURM = runs.ROOT / "tests/slurm"


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that none is left in the end."""
    long = "test_slurm.py", "test_readme.py", "test_memory.py", "test_start.py"
    items.sort(key=lambda item: item.path.name not in long)


@pytest.fixture(scope="session")
def cluster():
    """Start a cluster; give the environment variables with which programs find it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # not too long for Slurm
        # A login shell reads what the user has at home: here nothing.
        variables = os.environ | {"TMPDIR": place, "HOME": place}
        try:
            command = ["bash", SLURM / "start.sh", sys.executable]
            done = runs.run_or_skip(command, env=variables)
            assert done.returncode == 0, done.stderr
            yield variables | dict(re.findall(r"export (\w+)=(.*)", done.stdout))
        finally:  # also after Ctrl-C while it starts; a second one has to wait
            interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
            for folder in Path(place).glob("slurm.*"):
                subprocess.run(["bash", SLURM / "stop.sh", folder], check=False)
            signal.signal(signal.SIGINT, interrupt)
            assert not list(Path(place).glob("slurm.*"))
            assert runs.processes(f"SLURM_CONF={place}/") == []


@pytest.fixture(scope="session")
def start_fast(tmp_path_factory):
    """Return a function that starts a script; gives its number, and one that waits."""
    outputs = tmp_path_factory.mktemp("outputs")
    numbers, lock = itertools.count(), threading.Lock()
    pipes = dict.fromkeys(["stdin", "stdout"], subprocess.PIPE)
    environment = os.environ | {"SLURM_CPUS_PER_TASK": "2"}
    command = [sys.executable, runs.ROOT / "tests/driver.py", str(runs.LIMIT)]
    driver = subprocess.Popen(command, text=True, env=environment, **pipes)

    def ask(message):
        with lock:
            print(json.dumps(message), file=driver.stdin, flush=True)
            return json.loads(driver.stdout.readline())

    def start(*command, cwd, hook="", changes=None, **environment):
        case = {"arguments": list(map(str, command)), "folder": str(cwd)}
        case |= {"hook": hook, "changes": changes or {}}  # before, and of its text
        case |= {"environment": environment, "output": f"{outputs}/{next(numbers)}"}
        assert all(text in runs.MULTI.read_text() for text in case["changes"])
        pid = ask(case)

        def wait():
            code, seconds, bytes_read = ask(pid)
            written = [Path(f"{case['output']}.{i}").read_text() for i in (1, 2)]
            done = subprocess.CompletedProcess(case, code, *written)
            done.seconds = seconds  # of the processors
            done.bytes_read = bytes_read
            return done

        return pid, wait

    yield start
    driver.communicate()


@pytest.fixture(scope="session")
def run_fast(start_fast):
    """Return a function that runs a script, without the time that its start takes."""
    return lambda *command, **options: start_fast(*command, **options)[1]()


@pytest.fixture
def run_both(run_fast, tmp_path):
    """Return a function that runs the scripts, each in a folder of its own."""

    def run_two(*arguments, **settings):
        for script in runs.SCRIPTS:
            cwd = tmp_path / script.stem
            cwd.mkdir(exist_ok=True)
            yield cwd, run_fast(script, *arguments, cwd=cwd, **settings)

    return run_two


@pytest.fixture
def blurred(run_both):
    """Return a function that blurs with both scripts, and returns their one result."""

    def blur_twice(raster, window=5, **settings):
        results = []
        for cwd, done in run_both(raster, window, **settings):
            runs.check_silent(done)
            results.append(cwd / done.stdout.splitlines()[-1].split(": ")[0])
        simple, multi = results
        assert simple.read_bytes() == multi.read_bytes(), (raster, window, settings)
        return simple

    return blur_twice


@pytest.fixture
def dem(tmp_path):
    """Return a function that writes an array as dem.tif, as a profile says."""
    return functools.partial(rasters.write_raster, tmp_path / "dem.tif")


@pytest.fixture
def damaged(dem):
    """Return a raster whose second half is missing."""
    raster = dem(np.ones((1, 200, 200), np.float32))
    os.truncate(raster, raster.stat().st_size // 2)
    return raster


@pytest.fixture
def folders(tmp_path):
    """Make the folders in which run_both runs the scripts; return them."""
    paths = [tmp_path / script.stem for script in runs.SCRIPTS]
    for path in paths:
        (path / "smooth").mkdir(parents=True)
    return paths


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Return a small raster of random numbers."""
    values = np.random.default_rng(0).random((1, 200, 150), np.float32)
    return rasters.write_raster(tmp_path_factory.mktemp("small") / "small.tif", values)


@pytest.fixture
def public():
    """Return a folder that all users reach, which tmp_path is not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)
