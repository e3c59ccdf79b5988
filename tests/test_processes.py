"""No run hangs, leaves processes or half a result, whoever ends it or its workers."""

import contextlib
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tools
from tools import MULTI, SCRIPTS, check_silent, files, find_members, wait_until

# This runs before a script. At a place in the script, it waits until it may go on.
PAUSE = """
import builtins, multiprocessing.pool, os, pathlib, tempfile, time
import rasterio.io

gate = pathlib.Path({gate!r})
original = {place}

def pause(*arguments, **keywords):
    if {when}:
        (gate / str(os.getpid())).touch()
        while gate.exists() and not (gate / "go").exists():
            time.sleep(0.01)
    return original(*arguments, **keywords)

{place} = pause
"""
# Where to pause, in the order of time. Workers open the raster and the draft, too.
WORKER = "multiprocessing.pool.worker"
OPEN = "rasterio.open"
CREATE = "rasterio.io.DatasetWriter.update_tags"
LAID_OUT = "rasterio.io.DatasetWriter.__exit__"
READ = "rasterio.io.DatasetReader.read"
WRITE = "builtins.open"
RENAME = "pathlib.Path.replace"
CLEAN = "tempfile.TemporaryDirectory.cleanup"
END_OF_POOL = "multiprocessing.pool.Pool.close"
# Which call of it: in a worker, of the draft, in the middle of the raster or its end.
IN_WORKER = "multiprocessing.parent_process()"
DRAFT = '"r+b" in arguments'
MIDDLE = '50 < keywords["window"][0][0] < 150'
END = 'keywords["window"][0][1] == 200'
# So small pieces that each of two processes blurs some of a small raster.
PIECES = {"16e6 / ": "1e4 / "}


@pytest.fixture
def paused(start_fast):
    """Return a context manager that starts a script and waits until it pauses or ends."""

    @contextlib.contextmanager
    def start(folder, script, raster, place, when="True", more="", **environment):
        gate, cwd = folder / "gate", folder / "run"
        gate.mkdir(parents=True)
        cwd.mkdir()
        hook = PAUSE.format(gate=str(gate), place=place, when=when) + more
        case = {"cwd": cwd, "hook": hook, "changes": PIECES}
        pid, wait = start_fast(script, raster, **case, **environment)

        def end():
            wait_until(lambda: not find_members(pid))  # with its workers
            return wait()

        try:
            wait_until(lambda: files(gate) or not find_members(pid))
            yield pid, gate, end
        finally:
            for member in find_members(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member, signal.SIGKILL)

    return start


def check_means(raster, cwd, window):
    """Check the values of a result."""
    means = tools.brute_force(tools.read(raster), True, window)
    np.testing.assert_allclose(tools.read(cwd / "smooth" / raster.name), means, 1e-5)


def check_whole(done, raster, cwd):
    """Check that a run has given the whole result without a word, and nothing else."""
    check_silent(done)
    assert files(cwd) == ["smooth", f"smooth/{raster.name}"], done
    check_means(raster, cwd, 15)


def check_none(done, raster, cwd, *words):
    """Check that a run has failed with a line of words, and without a result."""
    tools.check_failed(done, raster, *words)
    assert files(cwd) in ([], ["smooth"]), done


@pytest.mark.parametrize(
    "place, when, victims",
    [
        (OPEN, IN_WORKER, 2),
        (READ, MIDDLE, 1),
        (READ, END, 1),
        (WRITE, f"{DRAFT} and {IN_WORKER}", 1),
        (END_OF_POOL, "True", 1),
        (END_OF_POOL, "True", 2),
    ],
)
def test_killed_worker_costs_no_part_of_a_result(
    tmp_path, paused, small, place, when, victims
):
    """While they begin, read or write, and when all is done and they are idle."""
    with paused(tmp_path, MULTI, small, place, when) as (pid, gate, end):
        workers = sorted(find_members(pid), key=lambda n: str(n) not in files(gate))
        workers.remove(pid)
        for worker in workers[:victims]:
            os.kill(worker, signal.SIGKILL)
        (gate / "go").touch()
        done = end()
    if place == END_OF_POOL:
        check_whole(done, small, tmp_path / "run")
    else:
        check_none(done, small, tmp_path / "run", "worker", "memory")


@pytest.fixture
def damaged(tmp_path):
    """Return a raster whose second half is missing."""
    values = np.ones((1, 200, 200), np.float32)
    raster = tools.write_raster(tmp_path / "damaged.tif", values)
    tools.damage_end(raster)
    return raster


def test_damage_shows_before_the_other_workers_are_done(tmp_path, paused, damaged):
    top = f'{IN_WORKER} and keywords["window"][0][1] < 50'
    with paused(tmp_path, MULTI, damaged, READ, top) as (_, _, end):
        check_none(end(), damaged, tmp_path / "run", "cannot read it", "band 1")


KILLS = [  # as a user, Slurm and Ctrl-C do
    (os.kill, signal.SIGTERM),
    (os.killpg, signal.SIGTERM),
    (os.killpg, signal.SIGINT),
]
STOPS = [(script, *kill) for script in SCRIPTS for kill in KILLS]
PLACES = [OPEN, CREATE, LAID_OUT, READ, WRITE, RENAME, CLEAN]


@pytest.mark.parametrize(
    "place, delay",
    [*((place, 0) for place in PLACES), *((OPEN, n / 100) for n in (1, 2, 4, 8))],
)
def test_stopped_run_leaves_nothing_behind(tmp_path, paused, small, place, delay):
    """At a place, or so many seconds after it, when the reason may be one of rasterio.

    In the end, it rather finishes; before it has begun a result, it may just die.
    """

    def stop(script, kill, number):
        folder = tmp_path / f"{script.stem} {kill.__name__} {number.name}"
        (folder / "tmp").mkdir(parents=True)
        when = DRAFT if place == WRITE else "True"
        first = "multiprocessing.get_context" if delay and script == MULTI else place
        case = folder, script, small, first, when
        late = place in (RENAME, CLEAN)
        with paused(*case, TMPDIR=str(folder / "tmp")) as (pid, gate, end):
            if delay:
                (gate / "go").touch()
                time.sleep(delay)
            elif (script, place) == (MULTI, OPEN):  # before GDAL opens anything
                assert len(find_members(pid)) == 3, "a worker would share what it opens"
            kill(pid, number)
            if late:
                (gate / "go").touch()
            done = end()
        if late or delay and done.returncode == 0:
            check_whole(done, small, folder / "run")
        elif place == OPEN and done.returncode == -number:
            assert done.stderr == "" and files(folder / "run") in ([], ["smooth"]), done
        else:
            check_none(done, small, folder / "run", *([] if delay else ["stopped"]))
        assert files(folder / "tmp") == []

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(stop, *zip(*STOPS)))


def test_worker_that_starts_late_ends_with_its_parent(tmp_path, paused, small):
    """It could wait for ever for a lock of another one, which was killed in time."""
    late = 'multiprocessing.current_process().name.endswith("2")'
    wait = "rasterio.open = lambda path: time.sleep(60)"  # nothing to do meanwhile
    with paused(tmp_path, MULTI, small, WORKER, late, wait) as (
        pid,
        gate,
        end,
    ):
        time.sleep(0.2)  # the other one begins to wait for something to do
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: pid not in find_members(pid))
        (gate / "go").touch()
        done = end()
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, ""), done


@pytest.mark.parametrize("place", [READ, RENAME])
def test_killed_run_can_be_repeated(tmp_path, paused, run_fast, small, place):
    """What it leaves, in sight, is in nobody's way."""
    cwd = tmp_path / "run"
    with paused(tmp_path, MULTI, small, place) as (pid, _, end):
        os.kill(pid, signal.SIGKILL)
        end()
    (left,) = (cwd / "smooth").glob("*")
    assert left.match("smooth/tmp*.unfinished"), left
    check_silent(run_fast(MULTI, small, cwd=cwd))
    check_means(small, cwd, 15)


@pytest.mark.parametrize("first", SCRIPTS)
@pytest.mark.parametrize("second", SCRIPTS)
def test_two_runs_at_once_do_not_mix_their_results(
    tmp_path, paused, run_fast, small, first, second
):
    cwd = tmp_path / "run"
    with paused(tmp_path, first, small, WRITE, DRAFT) as (_, gate, end):
        check_silent(run_fast(second, small, 5, cwd=cwd))
        check_means(small, cwd, 5)
        (gate / "go").touch()
        check_whole(end(), small, cwd)


@pytest.mark.parametrize("limit", [3, 30, 42])
def test_too_many_processes_do_not_hang(public, small, limit):
    public.chmod(0o777)
    # NumPy needs its threads to start at all.
    many = {"SLURM_CPUS_PER_TASK": "40", "OPENBLAS_NUM_THREADS": "1"}
    done = tools.run_as_nobody(MULTI, small, cwd=public, processes=limit, **many)
    check_none(done, small, public)


def test_nonsense_as_number_of_processes_or_memory_is_no_failure(
    tmp_path, run_fast, small
):
    names = "CPUS_PER_TASK", "CPUS_ON_NODE", "MEM_PER_NODE", "MEM_PER_CPU"
    for number in "", "0", "-1", "nonsense", "2(x3)", "²", "1.5", "4G":
        environment = {f"SLURM_{name}": number for name in names}
        check_silent(run_fast(MULTI, small, cwd=tmp_path, **environment))


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_default_start_method_changes_nothing(
    tmp_path, run_fast, small, damaged, method
):
    """The result, or the line that says why not; nothing stays in TMPDIR."""
    cwd, temporary = tmp_path / "run", tmp_path / "tmp"
    cwd.mkdir()
    temporary.mkdir()
    hook = f"import multiprocessing\nmultiprocessing.set_start_method({method!r})"
    options = {"cwd": cwd, "hook": hook, "TMPDIR": str(temporary)}
    check_none(run_fast(MULTI, damaged, **options), damaged, cwd, "cannot read it")
    check_whole(run_fast(MULTI, small, **options), small, cwd)
    assert files(temporary) == []


def test_the_processor_time_of_workers_is_counted(tmp_path, run_fast):
    """As a cluster books it: of a process and of those that it has waited for."""
    raster = tools.write_zeros(tmp_path / "a.tif", 1500, 1500)
    simple, multi = (run_fast(script, raster, 301, cwd=tmp_path) for script in SCRIPTS)
    check_silent(simple)
    check_silent(multi)
    assert multi.seconds > 0.8 * simple.seconds > 0.3
