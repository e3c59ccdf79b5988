"""No run hangs, leaves processes or half a result, whoever ends it or its workers."""

import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tools import (
    MULTI,
    SCRIPTS,
    SIMPLE,
    check_failed,
    check_silent,
    damage_end,
    end,
    files,
    read,
    run,
    run_as_nobody,
    started,
    wait_until,
    write_raster,
    write_zeros,
)

# Python runs this as it starts. At a place in the script, it waits until it may go on.
PAUSE = """
import builtins, multiprocessing.pool, os, pathlib, shutil, time
import rasterio.io, scipy.ndimage

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
# In a worker: the first thing it does, and the reading of a chunk's rows.
OPEN = "rasterio.open"
READ = "rasterio.io.DatasetReader.read"
IN_WORKER = "multiprocessing.parent_process()"
# Opening the result: to reserve its space, then to write a part of it.
WRITE = "builtins.open"
RESULT = '"r+b" in arguments'
# In the parent, in the order of time.
CREATE = "rasterio.io.DatasetWriter.update_tags"
LAID_OUT = "rasterio.io.DatasetWriter.__exit__"
END_OF_POOL = "multiprocessing.pool.Pool.close"
RENAME = "pathlib.Path.replace"
CLEAN = "shutil.rmtree"
# Which call of READ: in the middle of the sheet, and its end.
MIDDLE = '1500 < keywords["window"][0][0] < 1700'
END = 'keywords["window"][0][1] == 3200'


def make_pause(folder, place, when="True"):
    """Return the gate, a folder that will tell who waits, and what to start with."""
    gate = folder / "gate"
    gate.mkdir(parents=True)
    hook = folder / "hook"
    hook.mkdir()
    code = PAUSE.format(gate=str(gate), place=place, when=when)
    (hook / "sitecustomize.py").write_text(code)
    return gate, {"PYTHONPATH": str(hook)}


def find_workers(process):
    """Return the workers of a run with two processes, once both are there."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def find():
        workers = list(map(int, children.read_text().split()))
        return workers if len(workers) == 2 else None

    return wait_until(find)


@pytest.fixture(scope="module")
def sheet(tmp_path_factory):
    """Return a raster that two processes blur in several pieces each."""
    values = np.random.default_rng(0).integers(0, 255, (1, 3200, 3000), np.uint8)
    return write_raster(tmp_path_factory.mktemp("sheet") / "sheet.tif", values)


def check_whole(done, raster, cwd):
    """Check that a run has given the whole result without a word, and nothing else."""
    check_silent(done)
    assert files(cwd) == ["smooth", f"smooth/{raster.name}"]
    assert np.isfinite(read(cwd / "smooth" / raster.name)[0, 7:-7, 7:-7]).all()


def check_none(done, raster, cwd, *words):
    """Check that a run has failed with a line of words, and without a result."""
    check_failed(done, raster, *words)
    assert files(cwd) in ([], ["smooth"])


@pytest.mark.parametrize(
    "place, when, victims",
    [
        (OPEN, IN_WORKER, 2),
        (READ, MIDDLE, 1),
        (READ, END, 1),
        (WRITE, f"{RESULT} and {IN_WORKER}", 1),
        (END_OF_POOL, "True", 1),
        (END_OF_POOL, "True", 2),
    ],
)
def test_killed_worker_costs_no_part_of_a_result(tmp_path, sheet, place, when, victims):
    """While they begin, read or write, and when all is done and they are idle."""
    gate, environment = make_pause(tmp_path, place, when)
    cwd = tmp_path / "run"
    with started(MULTI, sheet, cwd=cwd, **environment) as process:
        wait_until(lambda: files(gate))
        paused = [int(name) for name in files(gate) if int(name) != process.pid]
        workers = find_workers(process)
        workers.sort(key=lambda pid: pid not in paused)  # first those at the place
        for pid in workers[:victims]:
            os.kill(pid, signal.SIGKILL)
        (gate / "go").touch()
        done = end(process, gate)
    if place == END_OF_POOL:
        check_whole(done, sheet, cwd)
    else:
        check_none(done, sheet, cwd, "worker", "memory")


def test_damage_shows_before_the_other_workers_are_done(tmp_path, sheet):
    raster = tmp_path / "sheet.tif"
    shutil.copy(sheet, raster)
    damage_end(raster)
    top = f'{IN_WORKER} and keywords["window"][0][1] < 1000'
    gate, environment = make_pause(tmp_path, READ, top)
    with started(MULTI, raster, cwd=tmp_path / "run", **environment) as process:
        done = end(process, gate)
    check_none(done, raster, tmp_path / "run", "damaged")


STOPS = [
    (script, kill, number)
    for script in SCRIPTS
    for kill, number in (
        (os.kill, signal.SIGTERM),
        (os.killpg, signal.SIGTERM),  # so does Slurm
        (os.killpg, signal.SIGINT),  # so does Ctrl-C
    )
]


def check_stopped(done, number, raster, cwd, *words):
    """Check that a run has said why it stopped, or died as it had begun no result."""
    if done.returncode == -number:
        assert (done.stderr, files(cwd)) == ("", files(cwd) and ["smooth"]), done
    else:
        check_none(done, raster, cwd, *words)


PLACES = [OPEN, READ, CREATE, LAID_OUT, WRITE, RENAME, CLEAN]


@pytest.mark.parametrize("place", PLACES)
def test_stopped_run_leaves_nothing_behind(tmp_path, small, place):
    def stop(script, kill, number):
        folder = tmp_path / f"{script.stem} {kill.__name__} {number.name}"
        when = [RESULT] if place == WRITE else []
        when += [IN_WORKER] if place in (OPEN, WRITE) and script == MULTI else []
        gate, environment = make_pause(folder, place, " and ".join(when) or "True")
        (folder / "tmp").mkdir()
        environment["TMPDIR"] = str(folder / "tmp")
        with started(script, small, cwd=folder / "run", **environment) as process:
            wait_until(lambda: files(gate))
            kill(process.pid, number)
            if place in (RENAME, CLEAN):  # so late that it finishes
                (gate / "go").touch()
            done = end(process, gate)
        if place in (RENAME, CLEAN):
            check_whole(done, small, folder / "run")
        else:
            check_stopped(done, number, small, folder / "run", "stopped, no result")
        assert files(folder / "tmp") == []

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(stop, *zip(*STOPS)))


def test_run_stopped_at_any_moment_leaves_nothing_behind(tmp_path, sheet):
    """But for the imports, in which Python answers Ctrl-C with a traceback.

    The reason may be that of a part of rasterio which was interrupted.
    """

    def stop(script, kill, number, delay):
        folder = tmp_path / f"{script.stem} {kill.__name__} {number.name} {delay}"
        gate, environment = make_pause(folder, OPEN)
        (gate / "go").touch()
        with started(script, sheet, cwd=folder / "run", **environment) as process:
            wait_until(lambda: len(files(gate)) > 1)
            time.sleep(delay)
            kill(process.pid, number)
            done = end(process)
        if done.returncode == 0:
            check_whole(done, sheet, folder / "run")
        else:
            check_stopped(done, number, sheet, folder / "run")

    cases = [(*stop, delay) for stop in STOPS for delay in (0.05, 0.3)]
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(stop, *zip(*cases)))


@pytest.mark.parametrize(
    "place, when", [(OPEN, IN_WORKER), (READ, "True"), (END_OF_POOL, "True")]
)
def test_killed_run_can_be_repeated(tmp_path, sheet, place, when):
    """What it leaves, in sight, is in nobody's way."""
    gate, environment = make_pause(tmp_path, place, when)
    smooth = tmp_path / "run" / "smooth"
    with started(MULTI, sheet, cwd=smooth.parent, **environment) as process:
        wait_until(lambda: files(gate) and files(smooth))
        find_workers(process)
        process.kill()
        end(process, gate)
    (left,) = smooth.iterdir()
    assert left.match("sheet.tif.[0-9]*.unfinished"), left
    check_silent(run(MULTI, sheet, cwd=smooth.parent))
    assert np.isfinite(read(smooth / sheet.name)[0, 7:-7, 7:-7]).all()


@pytest.mark.parametrize("first, second", [SCRIPTS, [SIMPLE] * 2, [MULTI] * 2])
def test_two_runs_at_once_do_not_mix_their_results(tmp_path, small, first, second):
    gate, environment = make_pause(tmp_path, WRITE, RESULT)
    cwd = tmp_path / "run"
    with started(first, small, cwd=cwd, **environment) as process:
        wait_until(lambda: files(gate))
        check_silent(run(second, small, cwd=cwd))
        result = read(cwd / "smooth" / "small.tif")
        (gate / "go").touch()
        check_whole(end(process), small, cwd)
    assert read(cwd / "smooth" / "small.tif").tobytes() == result.tobytes()


@pytest.mark.parametrize("limit", [3, 30, 42])
def test_too_many_processes_do_not_hang(public, small, limit):
    public.chmod(0o777)
    # NumPy needs its threads to start at all.
    many = {"SLURM_CPUS_PER_TASK": "40", "OPENBLAS_NUM_THREADS": "1"}
    done = run_as_nobody(MULTI, small, cwd=public, processes=limit, **many)
    check_none(done, small, public)


@pytest.mark.parametrize(
    "number", ["", "0", "-1", "nonsense", "2(x3)", "²", "1.5", "4G"]
)
def test_nonsense_as_number_of_processes_or_memory_is_no_failure(
    tmp_path, run_fast, small, number
):
    names = "CPUS_PER_TASK", "CPUS_ON_NODE", "MEM_PER_NODE", "MEM_PER_CPU"
    environment = {f"SLURM_{name}": number for name in names}
    check_silent(run_fast(MULTI, small, cwd=tmp_path, **environment))


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_default_start_method_changes_nothing(tmp_path, small, method):
    """The same result, or the line that says why not; nothing stays in TMPDIR."""
    damaged = write_raster(tmp_path / "damaged.tif", np.ones((1, 300, 300), np.uint8))
    damage_end(damaged)
    hook, folder = tmp_path / "hook", tmp_path / "tmp"
    hook.mkdir()
    folder.mkdir()
    (hook / "sitecustomize.py").write_text(
        f"import multiprocessing\nmultiprocessing.set_start_method({method!r})\n"
    )
    places = {"PYTHONPATH": str(hook), "TMPDIR": str(folder)}
    with started(MULTI, small, cwd=tmp_path / "good", **places) as process:
        check_whole(end(process), small, tmp_path / "good")
    with started(MULTI, damaged, cwd=tmp_path / "bad", **places) as process:
        check_none(end(process), damaged, tmp_path / "bad")
    assert files(folder) == []
    check_silent(run(SIMPLE, small, cwd=tmp_path))
    result = read(tmp_path / "smooth" / "small.tif")
    same = read(tmp_path / "good" / "smooth" / "small.tif")
    assert same.tobytes() == result.tobytes()


def test_the_processor_time_of_workers_is_counted(tmp_path):
    """As a cluster books it: of a process and of those that it has waited for."""
    raster = write_zeros(tmp_path / "a.tif", 3000, 3000)
    seconds = []
    for script in SCRIPTS:
        with started(script, raster, 301, cwd=tmp_path) as process:
            _, status, taken = os.wait4(process.pid, 0)
        assert status == 0
        seconds.append(taken.ru_utime + taken.ru_stime)
    assert seconds[1] > 0.8 * seconds[0]
