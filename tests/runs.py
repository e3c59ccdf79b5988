"""Runs for the tests: starting the scripts and other programs, and looking at them."""

import contextlib
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SIMPLE = ROOT / "simple_focal_mean.py"
MULTI = ROOT / "multiprocessing_focal_mean.py"
SCRIPTS = [SIMPLE, MULTI]
LIMIT = 120  # seconds after which whatever a test waits for counts as hanging

# Names that a shell, a format or a parser could take for something else.
NAMES = ['it\'s  "$(touch executed)" `touch executed`; touch executed & *.tif']
NAMES += ["back\\slash\\n %d {0} #1 äöå ☃.tif"]
NAMES += ["-dash.tif", "--help.tif", ".hidden.tif", "no ending"]


def run(*command, **options):
    """Run a command; return its exit code and what it printed."""
    options = {"capture_output": True, "text": True, "timeout": LIMIT} | options
    return subprocess.run(command, check=False, **options)


def run_or_skip(command, **options):
    """Run a command; skip the test, but not in CI, if it ends with 77 or unshare cannot."""
    done = run(*command, **options)
    missing = done.returncode == 77 or done.stderr.startswith("unshare: ")
    if missing and "CI" not in os.environ:
        pytest.skip(done.stderr)
    return done


def blur(script, raster, window=15, *, cwd):
    """Run a script that must end well and without a word of error; return the result's path."""
    done = run(sys.executable, script, raster, str(window), cwd=cwd)
    check_silent(done)
    return Path(cwd, done.stdout.splitlines()[-1].split(": ")[0])


def run_as_nobody(script, raster, *, cwd, processes=1000, **variables):
    """Run a script without root's rights, with at most so many processes of its user."""
    command = f"prlimit --nproc={processes}"
    if os.geteuid() == 0:  # a new user, who can read all, as Python may be in /root
        user = random.randrange(10_000, 60_000)
        command += f" setpriv --clear-groups --reuid={user} --regid={user}"
        command += " --inh-caps=+dac_read_search --ambient-caps=+dac_read_search"
    variables = os.environ | {"SLURM_CPUS_PER_TASK": "2"} | variables
    return run(*command.split(), sys.executable, script, raster, cwd=cwd, env=variables)


def check_failed(done, raster, *words):
    """Check that the last line of a failed run names the raster and a reason with words."""
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr, done
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"{raster}: ") and line != f"{raster}: ", done
    assert all(word in line for word in words), line


def check_silent(done):
    """Check that a run has ended well and without a word of error."""
    assert (done.returncode, done.stderr) == (0, ""), done


def files(folder):
    """Return what is in a folder, hidden files too, and below it."""
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def need(*programs, path=None):
    """Skip a test, but not in CI, where one of the programs is missing."""
    path = f"{path or os.environ['PATH']}:/usr/sbin"  # where the daemons are
    missing = [name for name in programs if not shutil.which(name, path=path)]
    if missing and "CI" not in os.environ:
        pytest.skip(f"not installed: {', '.join(missing)}")


def sees_memory(cluster):
    """Tell whether this Slurm sees what memory a job takes: 25.11 with a new glibc does not."""
    version = subprocess.check_output(["sinfo", "--version"], env=cluster, text=True)
    glibc = tuple(map(int, platform.libc_ver()[1].split(".")))
    return " 25.11" not in version or glibc < (2, 43)


def copy_tracked(folder):
    """Copy what git tracks of this repository to a folder; return the folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    command = 'git ls-files -z | xargs -0 cp --parents --target-directory "$0"'
    subprocess.run(["bash", "-c", command, folder], cwd=ROOT, check=True)
    return Path(folder)


def read_proc(name):
    """Return, of each process, its folder in /proc and a text there."""
    texts = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            texts[process] = (process / name).read_bytes().decode(errors="replace")
    return texts


def processes(*variables):
    """Return the folders in /proc of the processes that were started with variables."""
    texts = read_proc("environ").items()
    return [process for process, text in texts if all(v in text for v in variables)]


def find_members(session):
    """Return the processes of a session that are at work."""
    members = []
    for process, text in read_proc("stat").items():
        state, _, _, number = text.rpartition(") ")[2].split()[:4]
        if int(number) == session and state not in "ZX":
            members.append(int(process.name))
    return members


def wait_until(condition):
    """Wait until a function returns something true, and return that."""
    end = time.monotonic() + LIMIT
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.03)
    return value
