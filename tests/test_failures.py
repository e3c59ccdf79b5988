"""Nothing is lost, whatever happens: each failure is made for real.

More random cases than in a usual run: CASES=5000 pytest tests/test_failures.py
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
from tools import MULTI, ROOT, SCRIPTS, SIMPLE, brute_force, run, write_raster

SOON = 5  # seconds in which all must have ended
LIMIT = 60  # seconds after which a run counts as hanging

# A user without root's rights who can read all the same, as Python may be in /root.
NOBODY = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
NOBODY += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]

# Python runs this as it starts. At a place in the script, it waits until it may go on.
PAUSE = """
import multiprocessing, os, pathlib, tempfile, time
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
# In the parent, in the order of time.
CREATE = "rasterio.io.DatasetWriter.update_tags"
WRITE = "rasterio.io.DatasetWriter.write"
CLOSE = "rasterio.io.DatasetWriter.__exit__"
RENAME = "os.replace"
CLEAN = "tempfile.TemporaryDirectory.cleanup"

# Runs a script for each case that it is sent, each time in a new process but without
# the half second that the imports take; answers with the exit code.
DRIVER = """
import json, os, sys
import rasterio, scipy.ndimage

for line in sys.stdin:
    case = json.loads(line)
    child = os.fork()
    if not child:
        for number in (1, 2):
            os.dup2(os.open(case["outputs"][number - 1], os.O_WRONLY), number)
        os.chdir(case["folder"])
        os.environ |= case["environment"]
        code = open(sys.argv[1]).read()
        for name, value in case["constants"].items():
            code = code.replace(f"\\n{name} = ", f"\\n{name} = {value} or ")
        sys.argv[1:] = case["arguments"]
        exec(code)
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def check_one_line(done, raster, *words):
    """Check that a run has failed with one line that names the raster and has words."""
    assert done.returncode == 1, done
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{raster}: ") and "Traceback" not in line, line
    assert all(word in line for word in words), line


def files(folder):
    """Return what is in a folder, hidden files too, and below it."""
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def read(path):
    with rasterio.open(path) as raster:
        return raster.read()


def make_pause(folder, place, when="True"):
    """Return the gate, a folder that will tell who waits, and what to start with."""
    gate = folder / "gate"
    gate.mkdir(parents=True)
    hook = folder / "hook"
    hook.mkdir()
    code = PAUSE.format(gate=str(gate), place=place, when=when)
    (hook / "sitecustomize.py").write_text(code)
    return gate, {"PYTHONPATH": str(hook)}


@contextlib.contextmanager
def started(script, *arguments, cwd, **environment):
    """Start a script in a session of its own, of which nothing stays."""
    cwd.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, script, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"SLURM_CPUS_PER_TASK": "2"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for pid in find_members(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def find_members(session):
    """Return the processes of a session that are at work."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, number = stat.read_text().rpartition(") ")[2].split()[:4]
            if int(number) == session and state not in "ZX":
                members.append(int(stat.parent.name))
    return members


def wait_until(condition, seconds=LIMIT):
    """Wait until a function returns something true, and return that."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return value


def find_workers(process):
    """Return the workers of a run with two processes, once both are there."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def find():
        workers = list(map(int, children.read_text().split()))
        return workers if len(workers) == 2 else None

    return wait_until(find)


def end_soon(process):
    """Wait until a run and its workers have ended, soon; return how it ended."""
    stdout, stderr = process.communicate(timeout=SOON)
    wait_until(lambda: not find_members(process.pid), SOON)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.fixture(scope="module")
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
        for script in SCRIPTS
    }

    def run_case(script, *arguments, cwd, constants=None, **environment):
        driver = drivers[script]
        texts = [outputs / f"{script.stem}.{number}" for number in (1, 2)]
        for text in texts:
            text.write_text("")
        case = {
            "arguments": list(map(str, arguments)),
            "outputs": list(map(str, texts)),
            "folder": str(cwd),
            "environment": environment,
            "constants": constants or {},
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
        for script in SCRIPTS:
            cwd = tmp_path / script.stem
            cwd.mkdir(exist_ok=True)
            yield cwd, run_fast(script, *arguments, cwd=cwd)

    return run_two


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return a small raster of random numbers."""
    values = np.random.default_rng(0).random((1, 200, 150), np.float32)
    return write_raster(tmp_path_factory.mktemp("small") / "small.tif", values)


@pytest.fixture(scope="module")
def sheet(tmp_path_factory):
    """Return a raster of five chunks or more, of which four are given out at first."""
    values = np.random.default_rng(0).integers(0, 255, (1, 3200, 3000), np.uint8)
    return write_raster(tmp_path_factory.mktemp("sheet") / "sheet.tif", values)


@pytest.fixture
def public():
    """Return a folder that all users reach, which tmp_path is not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def small_disk(tmp_path):
    """Return a disk of its own, and a function that leaves so many bytes free there."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def leave(free):
        space = os.statvfs(disk)
        size = (space.f_blocks - space.f_bfree) * space.f_bsize + free
        subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)

    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        assert "CI" not in os.environ, done.stderr
        pytest.skip(f"a small disk needs mount: {done.stderr.strip()}")
    yield disk, leave
    subprocess.run(["umount", "--lazy", disk], check=True)


# The raster


def make_missing(path):
    return "No such file"


def make_folder(path):
    path.mkdir()
    return "not recognized"


def make_empty(path):
    path.touch()
    return "not recognized"


def make_text(path):
    path.write_text("ncols 3\nthe rest is no raster\n" * 99)
    return "not recognized"


def make_complex(path):
    write_raster(path, np.zeros((1, 30, 30), np.complex64))
    return "complex"


def make_only_alpha(path):
    write_raster(path, np.zeros((1, 30, 30), np.uint8))
    with rasterio.open(path, "r+") as raster:
        raster.colorinterp = [rasterio.enums.ColorInterp.alpha]
    return "no band"


def make_bandless(path):
    path.write_text('<VRTDataset rasterXSize="30" rasterYSize="30"></VRTDataset>')
    return "bands"


@pytest.mark.parametrize(
    "make",
    [
        make_missing,
        make_folder,
        make_empty,
        make_text,
        make_complex,
        make_only_alpha,
        make_bandless,
    ],
)
def test_not_a_raster(tmp_path, run_both, make):
    raster = tmp_path / "raster.tif"
    word = make(raster)
    for cwd, done in run_both(raster):
        check_one_line(done, raster, word)
        assert files(cwd) == []


def damage_end(path):
    os.truncate(path, path.stat().st_size // 2)


def damage_middle(path):
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 9000)  # more than one block


@pytest.mark.parametrize(
    "damage, compress",
    [(damage_end, "none"), (damage_end, "deflate"), (damage_middle, "deflate")],
)
def test_damaged_raster(tmp_path, run_both, damage, compress):
    raster = tmp_path / "damaged.tif"
    values = np.random.default_rng(0).integers(0, 99, (1, 600, 600), np.int16)
    tiles = {"tiled": True, "blockxsize": 64, "blockysize": 64}
    write_raster(raster, values, compress=compress, **tiles)
    damage(raster)
    began = time.monotonic()
    for cwd, done in run_both(raster):
        check_one_line(done, raster, "IReadBlock failed")
        assert files(cwd) == ["smooth"]
    assert time.monotonic() - began < SOON


def write_vrt(path, *sources, extra=""):
    """Write a virtual raster of 40 x 40 pixels, its sources one below the other."""
    rows = 40 // len(sources)
    sources = "".join(
        f"""<SimpleSource><SourceFilename>{source}</SourceFilename>
        <SourceBand>1</SourceBand><SrcRect xOff="0" yOff="0" xSize="40" ySize="{rows}"/>
        <DstRect xOff="0" yOff="{top}" xSize="40" ySize="{rows}"/></SimpleSource>"""
        for top, source in zip(range(0, 40, rows), sources)
    )
    path.write_text(
        f"""<VRTDataset rasterXSize="40" rasterYSize="40"><VRTRasterBand
        dataType="Float32" band="1"{extra}{sources}</VRTRasterBand></VRTDataset>"""
    )
    return path


@pytest.mark.parametrize("missing", ["missing.tif", "empty.tif", "two\nlines.tif"])
def test_sheet_of_virtual_raster_is_missing(tmp_path, run_both, missing):
    sheet = write_raster(tmp_path / "sheet.tif", np.ones((1, 20, 40), np.float32))
    (tmp_path / "empty.tif").touch()
    raster = write_vrt(tmp_path / "sheets.vrt", sheet, tmp_path / missing, extra=">")
    for cwd, done in run_both(raster, 3):
        check_one_line(done, raster, missing.replace("\n", " "))
        assert files(cwd) in ([], ["smooth"])


def test_hostile_virtual_raster_runs_no_code(tmp_path, run_both):
    sheet = write_raster(tmp_path / "sheet.tif", np.ones((1, 40, 40), np.float32))
    code = f""" subClass="VRTDerivedRasterBand">
        <PixelFunctionType>attack</PixelFunctionType>
        <PixelFunctionLanguage>Python</PixelFunctionLanguage>
        <PixelFunctionCode><![CDATA[
def attack(*arguments, **keywords):
    open({str(tmp_path / "executed")!r}, "w")
]]></PixelFunctionCode>"""
    raster = write_vrt(tmp_path / "hostile.vrt", sheet, extra=code)
    for cwd, done in run_both(raster, 3):
        check_one_line(done, raster)
        assert files(cwd) in ([], ["smooth"])
    assert not (tmp_path / "executed").exists()


def test_virtual_raster_with_remote_source(tmp_path, run_both):
    nobody_listens = "/vsicurl/http://127.0.0.1:9/sheet.tif"
    raster = write_vrt(tmp_path / "remote.vrt", nobody_listens, extra=">")
    for cwd, done in run_both(raster, 3):
        check_one_line(done, raster, "127.0.0.1:9")
        assert files(cwd) in ([], ["smooth"])


@pytest.mark.parametrize("window", [13, 1001])
def test_smaller_than_the_window(tmp_path, run_both, window):
    raster = write_raster(tmp_path / "thin.tif", np.ones((2, 12, 50), np.uint8))
    for cwd, done in run_both(raster, window):
        assert done.returncode == 0, done
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"{raster}: warning: smaller than the window"), line
        result = read(cwd / "smooth" / "thin.tif")
        assert result.shape == (2, 12, 50) and np.isnan(result).all()


# The command line


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ([], "0 arguments"),
        (["3", "5"], "3 arguments"),
        (["4"], "not 4"),
        (["0"], "not 0"),
        (["-3"], "not -3"),
        (["3.0"], "not 3.0"),
        (["1e1"], "not 1e1"),
        (["²"], "not ²"),
        ([""], "odd number"),
        (["many"], "not many"),
    ],
)
def test_wrong_arguments(tmp_path, run_both, arguments, problem):
    """The raster is missing: to open it first would fail with 1."""
    raster = [tmp_path / "missing.tif"] if arguments else []
    for cwd, done in run_both(*raster, *arguments):
        assert done.returncode == 2, done
        assert "RASTER [WINDOW]" in done.stderr
        assert problem in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert (done.stdout, files(cwd)) == ("", [])


# The disk


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("cache", ["32", "0"])
def test_disk_full(run_fast, small, small_disk, script, cache):
    """With GDAL's cache the disk fills as the result is closed, without as it writes."""
    disk, leave = small_disk
    constants = {'os.environ["GDAL_CACHEMAX"]': repr(cache)}
    assert run_fast(script, small, cwd=disk).returncode == 0
    target = disk / "smooth" / "small.tif"
    whole = target.read_bytes()
    target.write_text("earlier")
    failures = 0
    for free in range(0, len(whole) + 20_000, 4096):  # in steps of the disk's blocks
        leave(free)
        done = run_fast(script, small, cwd=disk, constants=constants)
        assert files(disk / "smooth") == ["small.tif"], free
        if done.returncode == 0:
            assert target.read_bytes() == whole, free
            target.write_text("earlier")
        else:
            check_one_line(done, small, "the disk full?")
            assert target.read_text() == "earlier", free
            failures += 1
    assert len(whole) / 4096 <= failures < len(whole) / 4096 + 4


@pytest.mark.parametrize("script", SCRIPTS)
def test_disk_full_of_a_larger_result(run_fast, sheet, small_disk, script):
    """One that GDAL's cache does not hold. Its head is longer than its last block."""
    disk, leave = small_disk
    leave(40_000_000)
    assert run_fast(script, sheet, cwd=disk).returncode == 0
    size = (disk / "smooth" / sheet.name).stat().st_size
    (disk / "smooth" / sheet.name).unlink()
    for free in (4096, size // 2, *range(size - 30_000, size - 4096, 4096)):
        leave(free)
        check_one_line(run_fast(script, sheet, cwd=disk), sheet, "the disk full?")
        assert files(disk) == ["smooth"]


def test_result_folder_is_a_file(tmp_path, run_both, small):
    for script in SCRIPTS:
        (tmp_path / script.stem).mkdir()
        (tmp_path / script.stem / "smooth").write_text("mine")
    for cwd, done in run_both(small):
        check_one_line(done, small, "smooth")
        assert (cwd / "smooth").read_text() == "mine"


def test_result_is_a_folder(tmp_path, run_both, small):
    for script in SCRIPTS:
        (tmp_path / script.stem / "smooth" / "small.tif").mkdir(parents=True)
    for cwd, done in run_both(small):
        check_one_line(done, small, "small.tif")
        assert files(cwd / "smooth") == ["small.tif"]


def run_as_nobody(folder, script, *arguments, processes=1000, **environment):
    """Run a script without root's rights, with at most so many processes."""
    command = [sys.executable, script, *arguments]
    if os.geteuid() == 0:
        command = NOBODY + command
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"SLURM_CPUS_PER_TASK": "2"} | environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NPROC, (processes,) * 2),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_result_folder_is_not_writable(public, small, script):
    folder = public / "smooth"
    folder.mkdir()
    (folder / "small.tif").write_text("earlier")
    folder.chmod(0o555)
    done = run_as_nobody(public, script, small)
    check_one_line(done, small, "Permission denied")
    assert (folder / "small.tif").read_text() == "earlier"
    folder.chmod(0o755)
    shutil.rmtree(folder)
    public.chmod(0o555)
    check_one_line(run_as_nobody(public, script, small), small, "Permission denied")
    public.chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS)
def test_result_is_read_only_and_open(public, small, script):
    """It is replaced whole: who reads the earlier one goes on to read that one."""
    folder = public / "smooth"
    folder.mkdir()
    folder.chmod(0o777)
    target = folder / "small.tif"
    target.write_text("earlier")
    target.chmod(0o444)
    with open(target) as reader:
        done = run_as_nobody(public, script, small)
        assert (done.returncode, done.stderr) == (0, "")
        assert reader.read() == "earlier"
    assert read(target).shape == (1, 200, 150)
    shutil.rmtree(folder)


def test_sidecars_of_an_earlier_result_go(tmp_path, run_both, small):
    for script in SCRIPTS:
        folder = tmp_path / script.stem / "smooth"
        folder.mkdir(parents=True)
        for ending in ("", ".aux.xml", ".ovr", ".msk"):
            (folder / f"small.tif{ending}").write_text("earlier")
        (folder / "small.tif.txt").write_text("notes")
    for cwd, done in run_both(small):
        assert (done.returncode, done.stderr) == (0, "")
        assert files(cwd / "smooth") == ["small.tif", "small.tif.txt"]
        assert read(cwd / "smooth" / "small.tif").shape == (1, 200, 150)


def test_sidecars_stay_without_a_new_result(tmp_path, run_both):
    for script in SCRIPTS:
        folder = tmp_path / script.stem / "smooth"
        folder.mkdir(parents=True)
        (folder / "damaged.tif.ovr").write_text("earlier")
    raster = write_raster(tmp_path / "damaged.tif", np.ones((1, 200, 200), np.uint8))
    damage_end(raster)
    for cwd, done in run_both(raster):
        check_one_line(done, raster)
        assert files(cwd / "smooth") == ["damaged.tif.ovr"]


# Processes that end


def check_ended(done, raster, cwd):
    """Check that a run has given the whole result without a word, or no result."""
    if done.returncode == 0:
        assert done.stderr == "", done
        assert files(cwd) == ["smooth", f"smooth/{raster.name}"]
        assert np.isfinite(read(cwd / "smooth" / raster.name)[0, 7:-7, 7:-7]).all()
    else:
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 1
        assert files(cwd) in ([], ["smooth"])


LAST = 'keywords["window"][0][1] == 3200'
MIDDLE = 'keywords["window"][0][0] > 1600'


@pytest.mark.parametrize(
    "place, when, victims",
    [
        (OPEN, IN_WORKER, 2),
        (READ, MIDDLE, 1),
        (READ, LAST, 1),
        (WRITE, "True", 1),
        (WRITE, LAST, 1),
        (WRITE, LAST, 2),
    ],
)
def test_worker_killed(tmp_path, sheet, place, when, victims):
    """While the parent writes, the workers are idle, or work on the next chunks."""
    gate, environment = make_pause(tmp_path, place, when)
    with started(MULTI, sheet, cwd=tmp_path / "run", **environment) as process:
        wait_until(lambda: files(gate))
        time.sleep(0.3)  # the workers that do not wait get through with their chunks
        paused = [int(name) for name in files(gate) if int(name) != process.pid]
        workers = find_workers(process)
        workers.sort(key=lambda pid: pid not in paused)  # first those at the place
        for pid in workers[:victims]:
            os.kill(pid, signal.SIGKILL)
        (gate / "go").touch()
        done = end_soon(process)
    if (place, when) == (WRITE, LAST):  # all the workers' work was done
        check_ended(done, sheet, tmp_path / "run")
    else:
        check_one_line(done, sheet, "worker", "memory")
        assert files(tmp_path / "run") == ["smooth"]


STOPS = [
    (script, kill, number)
    for script in SCRIPTS
    for kill, number in (
        (os.kill, signal.SIGTERM),
        (os.killpg, signal.SIGTERM),  # so does Slurm
        (os.killpg, signal.SIGINT),  # so does Ctrl-C
    )
]


@pytest.mark.parametrize("place", [READ, CREATE, WRITE, CLOSE, RENAME, CLEAN])
def test_stopped(tmp_path, small, place):
    def stop(script, kill, number):
        folder = tmp_path / f"{script.stem} {kill.__name__} {number.name}"
        gate, environment = make_pause(folder, place)
        (folder / "tmp").mkdir()
        environment["TMPDIR"] = str(folder / "tmp")
        with started(script, small, cwd=folder / "run", **environment) as process:
            wait_until(lambda: files(gate))
            kill(process.pid, number)
            if place in (RENAME, CLEAN):  # so late that it may finish as well
                time.sleep(0.1)
                (gate / "go").touch()
            done = end_soon(process)
        assert done.returncode != 0 or place in (RENAME, CLEAN), done
        check_ended(done, small, folder / "run")
        assert files(folder / "tmp") == []

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(stop, *zip(*STOPS)))


def test_stopped_at_any_moment(tmp_path, sheet):
    """But for the imports, in which Python answers Ctrl-C with a traceback."""

    def stop(script, kill, number, delay):
        cwd = tmp_path / f"{script.stem} {kill.__name__} {number.name} {delay}"
        gate, environment = make_pause(tmp_path / cwd.name, OPEN)
        (gate / "go").touch()
        with started(script, sheet, cwd=cwd / "run", **environment) as process:
            wait_until(lambda: len(files(gate)) > 1)
            time.sleep(delay)
            kill(process.pid, number)
            check_ended(end_soon(process), sheet, cwd / "run")

    cases = [(*stop, delay) for stop in STOPS for delay in (0.05, 0.3)]
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(stop, *zip(*cases)))


@pytest.mark.parametrize(
    "place, when", [(OPEN, IN_WORKER), (READ, "True"), (WRITE, LAST)]
)
def test_parent_killed(tmp_path, sheet, place, when):
    gate, environment = make_pause(tmp_path, place, when)
    cwd = tmp_path / "run"
    with started(MULTI, sheet, cwd=cwd, **environment) as process:
        wait_until(lambda: files(gate))
        find_workers(process)
        process.kill()
        end_soon(process)
    (left,) = (cwd / "smooth").iterdir()
    done = run(MULTI, sheet, cwd=cwd)
    assert done.returncode == 0, done
    assert left.name in done.stderr or not left.exists()
    result = read(cwd / "smooth" / sheet.name)
    assert np.isfinite(result[0, 7:-7, 7:-7]).all()


@pytest.mark.parametrize("first, second", [SCRIPTS, [SIMPLE] * 2, [MULTI] * 2])
def test_two_runs_at_the_same_time(tmp_path, small, first, second):
    gate, environment = make_pause(tmp_path, WRITE)
    cwd = tmp_path / "run"
    with started(first, small, cwd=cwd, **environment) as process:
        wait_until(lambda: files(gate))
        assert run(second, small, cwd=cwd).returncode == 0
        result = read(cwd / "smooth" / "small.tif")
        (gate / "go").touch()
        done = end_soon(process)
    assert (done.returncode, done.stderr) == (0, "")
    assert files(cwd) == ["smooth", "smooth/small.tif"]
    assert read(cwd / "smooth" / "small.tif").tobytes() == result.tobytes()


# Processes that start


@pytest.mark.parametrize("limit", [3, 30, 60])
def test_more_processes_than_allowed(public, small, limit):
    public.chmod(0o777)
    done = run_as_nobody(
        public,
        MULTI,
        small,
        processes=limit,
        SLURM_CPUS_PER_TASK="40",
        OPENBLAS_NUM_THREADS="1",  # NumPy needs its threads to start at all
    )
    check_one_line(done, small)
    assert files(public) in ([], ["smooth"])


@pytest.mark.parametrize("number", ["", "0", "-1", "nonsense", "2(x3)", "²", "1.5"])
def test_number_of_processes_is_nonsense(tmp_path, run_fast, small, number):
    done = run_fast(MULTI, small, cwd=tmp_path, SLURM_CPUS_PER_TASK=number)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_start_methods(tmp_path, small, method):
    """The same result with nothing left in the folder for such, or the same line."""
    damaged = write_raster(tmp_path / "damaged.tif", np.ones((1, 300, 300), np.uint8))
    damage_end(damaged)
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        f"import multiprocessing\nmultiprocessing.set_start_method({method!r})\n"
    )
    with tempfile.TemporaryDirectory() as folder:  # short, for the forkserver's socket
        places = {"PYTHONPATH": str(hook), "TMPDIR": folder}
        with started(MULTI, small, cwd=tmp_path / "good", **places) as process:
            done = end_soon(process)
        assert (done.returncode, done.stderr) == (0, "")
        if method != "forkserver":  # whose socket stays, as the script ends at once
            assert files(folder) == []
        with started(MULTI, damaged, cwd=tmp_path / "bad", **places) as process:
            check_one_line(end_soon(process), damaged, "IReadBlock failed")
    run(SIMPLE, small, cwd=tmp_path)
    result = read(tmp_path / "smooth" / "small.tif")
    same = read(tmp_path / "good" / "smooth" / "small.tif")
    assert same.tobytes() == result.tobytes()


# Names and lists

NAMES = [
    'it\'s  "$(touch executed)" `touch executed`; touch executed & *.tif',
    "back\\slash\\n %d {0} #1 äöå ☃.tif",
    "-dash.tif",
    "--help.tif",
    ".hidden.tif",
    "no ending",
]


@pytest.fixture
def job(tmp_path):
    """Return a function that starts array_job.sh for a line, and its current folder."""
    folder = tmp_path / "job"
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("array_job.sh", SIMPLE.name):
        shutil.copy(ROOT / name, folder)
    python = Path(sys.executable).parent
    (folder / ".venv/bin/activate").write_text(f'PATH="{python}:$PATH"\n')

    def run_job(line, *arguments, step=1):
        task = {"SLURM_ARRAY_TASK_ID": str(line), "SLURM_ARRAY_TASK_STEP": str(step)}
        return subprocess.run(
            ["bash", "array_job.sh", *map(str, arguments)],
            cwd=folder,
            env=os.environ | task,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )

    return run_job, folder


def test_names_are_taken_literally(job, small):
    run_job, folder = job
    (folder / "mapsheets.txt").write_text("\n".join(NAMES))
    for name in NAMES:
        shutil.copy(small, folder / name)
    before = files(folder)
    done = run_job(1, step=100)
    assert (done.returncode, done.stderr) == (0, "")
    results = {str(Path(name).with_suffix(".tif")) for name in NAMES}
    assert set(files(folder)) - set(before) == {
        "smooth",
        *(f"smooth/{name}" for name in results),
    }


@pytest.mark.parametrize("name", NAMES[:-1])
def test_name_as_argument_is_taken_literally(tmp_path, run_both, small, name):
    for script in SCRIPTS:
        (tmp_path / script.stem).mkdir()
        shutil.copy(small, tmp_path / script.stem / name)
    for cwd, done in run_both(name):
        assert (done.returncode, done.stderr) == (0, "")
        assert files(cwd) == sorted([name, "smooth", f"smooth/{name}"])


def test_name_of_the_list_is_taken_literally(job, small):
    run_job, folder = job
    for name in ("it's a $(touch executed) list.txt", "-list.txt"):
        (folder / name).write_text(f"{small}\n")
        done = run_job(1, name, 3)
        assert (done.returncode, done.stderr) == (0, "")
        assert "window 3 x 3" in done.stdout
    assert not (folder / "executed").exists()


@pytest.mark.parametrize(
    "text, line",
    [
        ("other.tif\n{small}\n\n\n", 2),
        ("other.tif\n{small}\n  \n\t\n", 2),
        ("other.tif\r\n{small}\r\n\r\n", 2),
        ("other.tif\n{small}", 2),
        (
            "".join(f"folder/{number}.tif\n" for number in range(9999)) + "{small}",
            10000,
        ),
    ],
)
def test_lists(job, small, text, line):
    run_job, folder = job
    (folder / "mapsheets.txt").write_text(text.format(small=small), newline="")
    done = run_job(line, step=7)
    assert (done.returncode, done.stderr) == (0, "")
    assert files(folder / "smooth") == ["small.tif"]


@pytest.mark.parametrize(
    "line, message",
    [("b.tif", "b.tif: b.tif: No such file"), ("", "mapsheets.txt, line 2: empty")],
)
def test_one_of_several_fails(job, small, line, message):
    run_job, folder = job
    (folder / "mapsheets.txt").write_text(f"a.tif\n{line}\nc.tif\n")
    for name in ("a.tif", "c.tif"):
        shutil.copy(small, folder / name)
    done = run_job(1, step=10)
    assert done.returncode != 0
    (failed,) = done.stderr.splitlines()
    assert failed.startswith(message)
    assert files(folder / "smooth") == ["a.tif", "c.tif"]


@pytest.mark.parametrize("line", [2, 4, 5])
def test_no_raster_in_the_line(job, small, line):
    run_job, folder = job
    (folder / "list.txt").write_text(f"{small}\n\nother.tif\n\n")
    done = run_job(line, "list.txt")
    assert done.returncode != 0
    (message,) = done.stderr.splitlines()
    assert message.startswith(f"list.txt, line {line}: ")
    assert not (folder / "smooth").exists()


@pytest.mark.parametrize("twin", ["{folder}/other/small.tif", "small.vrt\r"])
def test_two_lines_of_the_same_name(job, small, twin):
    run_job, folder = job
    twin = twin.format(folder=folder)
    (folder / "mapsheets.txt").write_text(f"{small}\n{twin}\n", newline="")
    done = run_job(1)
    assert done.returncode != 0
    (message,) = done.stderr.splitlines()
    assert str(small) in message and twin.strip() in message
    assert not (folder / "smooth").exists()


# Values


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_special_values(tmp_path, run_both, dtype):
    """They change the windows that they touch as IEEE says, and no others."""
    limits = np.finfo(dtype)
    values = np.random.default_rng(0).random((1, 120, 120)).astype(dtype)
    values[:, 90:] = limits.smallest_subnormal * np.arange(1, 121, dtype=dtype)
    special = values.copy()
    for place, value in {
        (10, 10): np.nan,
        (10, 40): np.inf,
        (10, 70): -np.inf,
        (40, 10): limits.max,
        (40, 40): limits.min,
        (40, 70): np.inf,
        (42, 72): -np.inf,
        (70, 10): limits.smallest_subnormal,
        (70, 40): -limits.tiny,
        (70, 70): -0.0,
        (61, 61): limits.eps,
        (99, 99): np.inf,
    }.items():
        special[0][place] = value
    usual = write_raster(tmp_path / "usual.tif", values)
    raster = write_raster(tmp_path / "special.tif", special)
    everywhere = np.ones(special.shape, bool)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        expected = brute_force(special, everywhere, 5)
    touched = brute_force(values != special, everywhere, 5) != 0
    results = []
    for _, done in run_both(usual, 5):
        assert (done.returncode, done.stderr) == (0, "")
    for cwd, done in run_both(raster, 5):
        assert (done.returncode, done.stderr) == (0, "")
        result = read(cwd / "smooth" / "special.tif")
        assert result.dtype == dtype
        tiny = 5 * limits.smallest_subnormal
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=tiny)
        before = read(cwd / "smooth" / "usual.tif")
        assert np.array_equal(result[~touched], before[~touched])
        results.append(result.tobytes())
    assert results[0] == results[1]


# Random cases


def make_case(seed, path):
    """Write a random raster; return its values, which are valid, and how to blur it."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(rng.choice(["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8", "i8"]))
    bands, height, width = rng.integers(1, [4, 70, 70])
    values = rng.normal(0, 10.0 ** rng.integers(0, 4), (bands, height, width))
    low, high = (-1e9, 1e9) if dtype.kind == "f" else (0, np.iinfo(dtype).max)
    values = np.clip(values, low, high).astype(dtype)
    holes = rng.random(values.shape) < 0.002
    kind = rng.choice(["none", "nodata", "mask", "alpha", "nan"])
    if kind == "alpha" and (dtype not in (np.uint8, np.uint16) or bands == 2):
        kind = "none"  # GDAL takes these types for alpha, beside one band or three
    profile = {"compress": str(rng.choice(["none", "deflate", "lzw", "zstd"]))}
    profile["transform"] = rasterio.Affine(2, 0, 0, 0, -2, 0)
    profile["interleave"] = str(rng.choice(["pixel", "band"]))
    if rng.random() < 0.5:
        side = int(rng.choice([16, 32, 64]))
        profile |= {"tiled": True, "blockxsize": side, "blockysize": side}
    else:
        profile["blockysize"] = int(rng.integers(1, height + 1))
    if kind == "nan" and dtype.kind == "f":
        values[holes] = np.nan
    elif kind in ("mask", "alpha"):
        holes[:] = holes.any(axis=0)
    elif kind == "nodata":
        profile["nodata"] = int(rng.choice([0, 1, 99]))
        holes = values == profile["nodata"]
    else:
        holes[:] = False
    shape = {"count": int(bands), "height": int(height), "width": int(width)}
    shape["count"] += kind == "alpha"
    profile |= {"driver": "GTiff", "dtype": dtype, **shape}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", **profile) as file,
    ):
        if kind == "alpha":
            colors = [rasterio.enums.ColorInterp.undefined] * bands
            file.colorinterp = [*colors, rasterio.enums.ColorInterp.alpha]
            file.write(np.where(holes[0], 0, high).astype(dtype), int(bands) + 1)
        file.write(values, list(range(1, bands + 1)))
        if kind == "mask":
            file.write_mask(~holes[0])
    constants = {"PIECE": int(rng.integers(1, 9000))}
    if rng.random() < 0.7:  # so many rows in a chunk, up to more chunks than the ring
        row = int(width * bands * np.result_type(dtype, np.float32).itemsize)
        constants["CHUNK"] = row * int(rng.integers(1, 30))
    window = int(rng.choice([1, 3, 5, 7, 15, 71], p=[0.1, 0.3, 0.2, 0.2, 0.15, 0.05]))
    environment = {"SLURM_CPUS_PER_TASK": str(rng.integers(1, 5))}
    return values, ~holes, window, {"constants": constants, **environment}


def test_random_cases(tmp_path, run_fast):
    """Both scripts give the reference's result, and the same one bit for bit."""
    assert all(f"\n{name} = " in MULTI.read_text() for name in ("PIECE", "CHUNK"))
    seeds = range(int(os.environ.get("CASES", "120")))
    cases = [make_case(seed, tmp_path / f"{seed}.tif") for seed in seeds]

    def blur_all(script):
        cwd = tmp_path / script.stem
        cwd.mkdir()
        for seed, (_, _, window, settings) in zip(seeds, cases):
            raster = tmp_path / f"{seed}.tif"
            done = run_fast(script, raster, window, cwd=cwd, **settings)
            assert done.returncode == 0, (seed, done)

    with ThreadPoolExecutor() as threads:
        list(threads.map(blur_all, SCRIPTS))
    for seed, (values, valid, window, settings) in zip(seeds, cases):
        expected = brute_force(values, valid, window)
        simple, multi = (
            read(tmp_path / script.stem / "smooth" / f"{seed}.tif")
            for script in SCRIPTS
        )
        assert simple.dtype == np.result_type(np.float32, values.dtype), seed
        tolerance = 1e-6 * np.abs(values[valid], dtype=np.float64).max(initial=0)
        np.testing.assert_allclose(
            simple,
            expected,
            rtol=0,
            atol=tolerance,
            err_msg=f"seed {seed}: {window} {settings}",
        )
        assert simple.tobytes() == multi.tobytes(), seed
