"""No run hangs, leaves processes or half a result, whoever ends it or its workers."""

import contextlib
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM, SIGUSR1, SIGXCPU

import numpy as np
import pytest
import rasters
import runs
from runs import MULTI, SCRIPTS, check_silent, files, find_members, wait_until

# This runs before a script. At a place in the script, it waits until it may go on.
PAUSE = """
import builtins, multiprocessing.pool, os, pathlib, rasterio.io, shutil, time

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
OPEN = "rasterio.open"
DRAFTED = [f"rasterio.io.DatasetWriter.{name}" for name in ("update_tags", "__exit__")]
READ = "rasterio.io.DatasetReader.read"
WRITE = "builtins.open"
RENAME = "pathlib.Path.replace"
CLEAN = "shutil.rmtree"
END_OF_POOL = "multiprocessing.pool.Pool.close"
# Which call of it: in a worker, of the draft, or by the rows that it reads, of 200.
IN_WORKER = "multiprocessing.parent_process()"
DRAFT = '"r+b" in arguments'
ROWS = 'keywords["window"][0]'


@pytest.fixture
def paused(start_fast):
    """Return a context manager that starts a script and waits until it pauses or ends."""

    @contextlib.contextmanager
    def start(folder, script, raster, place, when="True"):
        gate, cwd = folder / "gate", folder / "run"
        gate.mkdir(parents=True)
        cwd.mkdir()
        hook = PAUSE.format(gate=str(gate), place=place, when=when)
        pieces = {"piece_bytes = 1.6e7": "piece_bytes = 1e4"}  # each process blurs some
        case = {"cwd": cwd, "hook": hook, "changes": pieces, "TMPDIR": str(cwd)}
        pid, wait = start_fast(script, raster, **case)

        def end():
            wait_until(lambda: not find_members(pid))  # with its workers
            return wait()

        try:
            wait_until(lambda: files(gate) or not find_members(pid))
            yield pid, gate, end
        finally:
            for member in find_members(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member, SIGKILL)

    return start


def check_whole(done, raster, cwd, window=15, before=("smooth",)):
    """Check that a run has given the whole result without a word, and nothing else."""
    check_silent(done)
    assert files(cwd) == sorted({*before, f"smooth/{raster.name}"}), done
    means = rasters.brute_force(rasters.read(raster), True, window)
    np.testing.assert_allclose(rasters.read(cwd / "smooth" / raster.name), means, 1e-5)


def check_none(done, raster, cwd, *words):
    """Check that a run has failed with a line of words, and without a result."""
    runs.check_failed(done, raster, *words)
    assert files(cwd) in ([], ["smooth"]), done


BUSY = [(OPEN, IN_WORKER, 2), (WRITE, f"{DRAFT} and {IN_WORKER}", 1)]
BUSY += [(READ, f"50 < {ROWS}[0] < 150", 1), (READ, f"{ROWS}[1] == 200", 1)]
KILLED = [(*case, SIGKILL) for case in BUSY] + [(READ, IN_WORKER, 2, SIGTERM)]
KILLED += [(END_OF_POOL, "True", victims, SIGKILL) for victims in (1, 2)]  # idle ones


@pytest.mark.parametrize("case", KILLED)
def test_killed_worker_costs_no_rows(tmp_path, paused, small, case):
    """While they begin, read or write, and when all is done and they are idle."""
    place, when, victims, number = case
    with paused(tmp_path, MULTI, small, place, when) as (pid, gate, end):
        workers = sorted(find_members(pid), key=lambda n: str(n) not in files(gate))
        workers.remove(pid)
        for worker in workers[:victims]:
            os.kill(worker, number)
        (gate / "go").touch()
        done = end()
    if place == END_OF_POOL:
        check_whole(done, small, tmp_path / "run")
    else:
        check_none(done, small, tmp_path / "run", "worker", "memory")
        assert done.stderr.count("\n") == 1  # and nothing from the workers


def test_damage_shows_before_the_other_workers_are_done(tmp_path, paused, damaged):
    with paused(tmp_path, MULTI, damaged, READ, f"{ROWS}[1] < 50") as (_, _, end):
        check_none(end(), damaged, tmp_path / "run", "cannot read it", "band 1")


# As a user, Slurm and Ctrl-C do.
KILLS = [(os.kill, SIGTERM), (os.killpg, SIGTERM), (os.killpg, SIGINT)]
OTHERS = [(os.kill, SIGUSR1), (os.killpg, SIGHUP), (os.kill, SIGXCPU)]
PLACES = [(place, 0) for place in (OPEN, *DRAFTED, READ, WRITE, RENAME, CLEAN)]
PLACES += [(OPEN, n / 100) for n in (1, 2, 4, 8)]


@pytest.mark.parametrize("place, delay", PLACES)
def test_stopped_run_leaves_nothing_behind(tmp_path, paused, small, place, delay):
    """At a place, or so many seconds after it, when the reason may be one of rasterio."""

    def stop(script, by):
        kill, number = by
        folder = tmp_path / f"{script.stem} {kill.__name__} {number.name}"
        when = DRAFT if place == WRITE else "True"
        first = "multiprocessing.get_context" if delay and script == MULTI else place
        late = place in (RENAME, CLEAN)  # when it rather finishes
        with paused(folder, script, small, first, when) as (pid, gate, end):
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
        elif place == OPEN and done.returncode == -number:  # it had begun nothing
            assert done.stderr == "" and files(folder / "run") in ([], ["smooth"]), done
        else:
            check_none(done, small, folder / "run", *([] if delay else ["stopped"]))

    with ThreadPoolExecutor(3) as threads:
        kills = [*KILLS, *OTHERS] if place in (DRAFTED[0], READ) else KILLS
        list(threads.map(stop, *zip(*itertools.product(SCRIPTS, kills))))


def test_worker_that_starts_late_ends_with_its_parent(tmp_path, paused):
    """It could wait for ever for a lock of another one, which was killed in time."""
    late = 'multiprocessing.current_process().name.endswith("2")'
    fifo = tmp_path / "fifo.tif"
    os.mkfifo(fifo)  # who opens it waits, so that there is nothing to do meanwhile
    begin = "multiprocessing.pool.worker"
    with paused(tmp_path, MULTI, fifo, begin, late) as (pid, gate, end):
        time.sleep(0.2)  # the other one begins to wait for something to do
        os.kill(pid, SIGTERM)
        wait_until(lambda: pid not in find_members(pid))
        (gate / "go").touch()
        done = end()
    check_none(done, fifo, tmp_path / "run", "stopped")


@pytest.mark.parametrize("place", [READ, RENAME])
def test_killed_run_can_be_repeated(tmp_path, paused, run_fast, small, place):
    """What it leaves, in sight, is in nobody's way."""
    cwd = tmp_path / "run"
    with paused(tmp_path, MULTI, small, place) as (pid, _, end):
        os.kill(pid, SIGKILL)
        end()
    (left,) = (cwd / "smooth").glob("*")
    assert left.match("smooth/*.unfinished"), left
    before = files(cwd)
    check_whole(run_fast(MULTI, small, cwd=cwd), small, cwd, before=before)


@pytest.mark.parametrize("first, second", list(itertools.product(SCRIPTS, SCRIPTS)))
def test_two_runs_at_once_do_not_mix(tmp_path, paused, run_fast, small, first, second):
    cwd = tmp_path / "run"
    with paused(tmp_path, first, small, WRITE, DRAFT) as (_, gate, end):
        before = files(cwd)
        check_whole(run_fast(second, small, 5, cwd=cwd), small, cwd, 5, before)
        (gate / "go").touch()
        check_whole(end(), small, cwd)


@pytest.mark.parametrize("limit", [3, 30, 42])
def test_too_many_processes_do_not_hang(public, small, limit):
    public.chmod(0o777)
    # NumPy needs its threads to start at all.
    many = {"SLURM_CPUS_PER_TASK": "40", "OPENBLAS_NUM_THREADS": "1"}
    done = runs.run_as_nobody(MULTI, small, cwd=public, processes=limit, **many)
    check_none(done, small, public)


def test_nonsense_as_cpus_or_memory_is_no_failure(tmp_path, run_fast, small):
    for number in "", "0", "-1", "nonsense", "2(x3)", "²", "1.5", "4G":
        environment = {"SLURM_CPUS_PER_TASK": number, "SLURM_MEM_PER_CPU": number}
        check_silent(run_fast(MULTI, small, cwd=tmp_path, **environment))


@pytest.mark.parametrize("delay", [0, 0.002, 0.005, 0.01])
def test_worker_killed_at_its_start_does_not_hang(tmp_path, paused, small, delay):
    """Before the Pool is complete, when a new worker can already have taken its place."""
    first = "multiprocessing.get_context"
    with paused(tmp_path, MULTI, small, first) as (pid, gate, end):
        (gate / "go").touch()
        wait_until(lambda: len(find_members(pid)) != 1)  # it has workers, or has ended
        time.sleep(delay)
        for worker in sorted(set(find_members(pid)) - {pid})[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, SIGKILL)
        done = end()
    if done.returncode:
        check_none(done, small, tmp_path / "run", "worker")
    else:
        check_whole(done, small, tmp_path / "run")


def test_the_processor_time_of_workers_is_counted(tmp_path, run_fast):
    """As a cluster books it: of a process and of those that it has waited for."""
    raster = rasters.write_zeros(tmp_path / "a.tif", 1500, 1500)
    runs = [
        [run_fast(script, raster, 301, cwd=tmp_path) for script in SCRIPTS]
        for _ in range(3)  # the fewest seconds count, as other programs run, too
    ]
    for done in itertools.chain(*runs):
        check_silent(done)
    simple, multi = np.min([[done.seconds for done in pair] for pair in runs], 0)
    print(f"{simple:.2f} s, with workers {multi:.2f} s")
    assert multi > 0.8 * simple > 0.3
