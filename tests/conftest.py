"""What several files of tests share: a Slurm cluster, fast runs, rasters."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import tools

FOLDER = tools.ROOT / "tests" / "slurm"

# Runs a script for each case that it is sent, each time in a new process but without
# the half second that the imports take, and answers with its number. Sent that number,
# it waits for the process; answers with the exit code and the processor seconds.
DRIVER = """
import ctypes, json, os, signal, sys
import rasterio, scipy.ndimage

for line in sys.stdin:
    case = json.loads(line)
    if isinstance(case, int):
        _, status, taken = os.wait4(case, 0)
        seconds = taken.ru_utime + taken.ru_stime
        print(json.dumps([os.waitstatus_to_exitcode(status), seconds]), flush=True)
        continue
    if os.fork() == 0:
        os.setsid()
        print(os.getpid(), flush=True)
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
        code = open(case["arguments"][0]).read()
        for old, new in case["changes"].items():
            code = code.replace(old, new)
        sys.argv = case["arguments"]
        signal.alarm(case["limit"])
        exec(case["hook"], {})
        exec(code)
        break
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
def start_fast(tmp_path_factory):
    """Return a function that starts a script, without the time that its start takes.

    It gives the number of the process and a function that waits until that has ended.
    """
    outputs = tmp_path_factory.mktemp("outputs")
    numbers, lock = itertools.count(), threading.Lock()
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"SLURM_CPUS_PER_TASK": "2"},
    )

    def ask(message):
        with lock:
            driver.stdin.write(json.dumps(message) + "\n")
            driver.stdin.flush()
            return json.loads(driver.stdout.readline())

    def start(*command, cwd, hook="", changes=None, **environment):
        case = {"arguments": list(map(str, command)), "folder": str(cwd)}
        case |= {"environment": environment, "limit": tools.LIMIT}
        case |= {"hook": hook, "changes": changes or {}}  # before, and of its text
        assert all(text in tools.MULTI.read_text() for text in case["changes"])
        number = next(numbers)
        texts = [outputs / f"{number}.{name}" for name in ("out", "err")]
        for text in texts:
            text.touch()
        pid = ask(case | {"outputs": list(map(str, texts))})

        def wait():
            code, seconds = ask(pid)
            written = [text.read_text() for text in texts]
            done = subprocess.CompletedProcess(case, code, *written)
            done.seconds = seconds  # of the processors
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
        for script in tools.SCRIPTS:
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
            tools.check_silent(done)
            results.append(cwd / done.stdout.splitlines()[-1].split(": ")[0])
        simple, multi = results
        assert simple.read_bytes() == multi.read_bytes(), (raster, window, settings)
        return simple

    return blur_twice


@pytest.fixture
def dem(tmp_path):
    """Return a function that writes an array as dem.tif, as a profile says."""

    def write(bands, **profile):
        return tools.write_raster(tmp_path / "dem.tif", bands, **profile)

    return write


@pytest.fixture
def folders(tmp_path):
    """Make the folders in which run_both runs the scripts; return them."""
    paths = [tmp_path / script.stem for script in tools.SCRIPTS]
    for path in paths:
        (path / "smooth").mkdir(parents=True)
    return paths


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
