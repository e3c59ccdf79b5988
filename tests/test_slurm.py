"""The batch files on a real Slurm cluster of three nodes, which tests/slurm starts."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tools

SIMPLE = "batch_job_simple.sh"
MULTI = "batch_job_multiprocessing.sh"
ARRAY = "array_job.sh"
SHEETS = Path(tools.ROOT, "mapsheets.txt").read_text().split()


@pytest.fixture
def checkout(tmp_path):
    """Give a copy of what git tracks, with .venv."""
    folder = tools.copy_tracked(tmp_path / "checkout")
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


@pytest.fixture(scope="module")
def sheet(tmp_path_factory):
    """Give a sheet of 3000 x 3000 pixels in float32, as the memory requests are for."""
    values = np.random.default_rng(0).random((1, 3000, 3000), np.float32)
    return tools.write_raster(tmp_path_factory.mktemp("sheet") / "sheet.tif", values)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Give a raster of 12000 x 12000 pixels in float32, which takes no room itself."""
    folder = tmp_path_factory.mktemp("large")
    return tools.write_zeros(folder / "large.tif", 12000, 12000)


@pytest.fixture
def tall(tmp_path):
    """Give the path of a raster that is slow to write."""
    return tools.write_zeros(tmp_path / "tall.tif", 3000, 40000)


@pytest.fixture(scope="module", autouse=True)
def late_job(cluster, tmp_path_factory):
    """Start a job that has no time left; give its number, folder, command and raster.

    Slurm sees it within 30 seconds. It sleeps so long, and the other tests go on.
    """
    folder = tools.copy_tracked(tmp_path_factory.mktemp("late"))
    (folder / ".venv").symlink_to(sys.prefix)
    raster = tools.write_zeros(folder / "tall.tif", 3000, 40000)
    command = f"sbatch --mem-per-cpu=2000 {MULTI} {raster}"
    job = submit(cluster, folder, f"{command} 1001")
    tools.wait_until(lambda: drafts(folder))
    # Slurm's shortest limit is a minute, but the end can be moved.
    ask(cluster, "scontrol", "update", f"job={job}", "EndTime=now+1")
    for process in processes_of(cluster, job):
        os.kill(int(process.name), signal.SIGSTOP)
    return job, folder, command, raster


def drafts(folder):
    """Return the unfinished results in a checkout."""
    return list((folder / "smooth").glob("tall.tif*.unfinished"))


def ask(cluster, *command, cwd=None):
    """Run one of Slurm's programs; return what it prints."""
    command = [str(word) for word in command]
    done = subprocess.run(
        command, cwd=cwd, env=cluster, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done
    return done.stdout


def submit(cluster, folder, command):
    """Type a command in a folder, which must submit a job; return the job's number."""
    answer = ask(cluster, *command.split(), cwd=folder)
    return re.fullmatch(r"Submitted batch job (\d+)\n", answer)[1]


def show(cluster, job):
    """Return what Slurm knows about a job, as a dictionary for each task, in order."""
    lines = ask(cluster, "scontrol", "--oneliner", "show", "job", job).splitlines()
    tasks = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines]
    return sorted(tasks, key=lambda task: task.get("ArrayTaskId", ""))


def ended(cluster, job):
    """Return what Slurm knows about a job once all of its tasks have ended, else None."""
    tasks = show(cluster, job)
    going = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"}
    return None if going & {task["JobState"] for task in tasks} else tasks


def run(cluster, folder, command):
    """Submit a job and wait for its end; return what Slurm knows, task by task."""
    job = submit(cluster, folder, command)
    return tools.wait_until(lambda: ended(cluster, job))


def states(tasks):
    """Return the states in which the tasks of a job ended."""
    return [task["JobState"] for task in tasks]


def results(folder):
    """Return the names of all in folder smooth, hidden or not, but .gitignore."""
    return sorted(
        {path.name for path in (folder / "smooth").iterdir()} - {".gitignore"}
    )


def names(rasters):
    """Return the names of the results that these rasters have."""
    return sorted(Path(raster).name for raster in rasters)


def texts(folder):
    """Return what the job wrote to out.txt and to err.txt."""
    return (folder / "out.txt").read_text(), (folder / "err.txt").read_text()


def processes_of(cluster, job):
    """Return the folders in /proc of a job's processes, even if Slurm lost them."""
    return tools.processes(
        f"SLURM_CONF={cluster['SLURM_CONF']}", f"SLURM_JOB_ID={job}\0"
    )


def has_open(process, path):
    """Tell whether a process, given by its folder in /proc, has a file open."""
    try:
        return path in [link.readlink() for link in (process / "fd").iterdir()]
    except OSError:  # it has ended meanwhile
        return False


def test_simple(cluster, checkout, tmp_path):
    (task,) = run(cluster, checkout, "sbatch batch_job_simple.sh")
    out, err = texts(checkout)
    assert (task["JobState"], task["ExitCode"], err) == ("COMPLETED", "0:0", "")
    assert out.startswith("smooth/jacksboro_nw.tif: 220 x 150 pixels, window 15 x 15")
    direct = tools.blur(tools.SIMPLE, checkout / SHEETS[0], cwd=tmp_path)
    result = checkout / "smooth" / "jacksboro_nw.tif"
    assert tools.read(result).tobytes() == tools.read(direct).tobytes()
    assert task["TimeLimit"] == "00:01:00"  # asked for are 5 seconds
    assert task["Partition"] == "serial"


def test_array(cluster, checkout):
    tasks = run(cluster, checkout, "sbatch array_job.sh")
    assert states(tasks) == ["COMPLETED"] * 2
    assert results(checkout) == names(SHEETS[:2])
    job = tasks[0]["ArrayJobId"]
    logs = sorted(checkout.glob("array_job_*.txt"))
    kinds = [f"err_{job}_1", f"err_{job}_2", f"out_{job}_1", f"out_{job}_2"]
    assert [log.name for log in logs] == [f"array_job_{kind}.txt" for kind in kinds]
    assert [log.read_text() for log in logs[:2]] == ["", ""]
    for log, path in zip(logs[2:], SHEETS):
        assert f"smooth/{Path(path).name}: " in log.read_text().splitlines()[-1]


def test_array_of_four_on_several_nodes(cluster, checkout):
    # Two tasks of 9 CPUs do not fit on a node of 16.
    tasks = run(cluster, checkout, "sbatch --array=1-4 --cpus-per-task=9 array_job.sh")
    assert states(tasks) == ["COMPLETED"] * 4
    assert len({task["BatchHost"] for task in tasks}) > 1
    assert results(checkout) == names(SHEETS)


def test_multiprocessing(cluster, checkout, tmp_path):
    (task,) = run(cluster, checkout, "sbatch batch_job_multiprocessing.sh")
    out, err = texts(checkout)
    assert (task["JobState"], task["ExitCode"], err) == ("COMPLETED", "0:0", "")
    assert "smooth/jacksboro.tif: 403 x 344 pixels" in out
    raster = checkout / "tests" / "data" / "jacksboro.vrt"
    direct = tools.blur(tools.SIMPLE, raster, cwd=tmp_path)
    result = tools.read(checkout / "smooth" / "jacksboro.tif")
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, tools.read(direct))


@pytest.mark.parametrize(("option", "count"), [("", 4), ("--cpus-per-task=3 ", 3)])
def test_as_many_processes_as_cpus(cluster, checkout, sheet, option, count):
    job = submit(cluster, checkout, f"sbatch {option}{MULTI} {sheet} 101")
    most = 0
    while not ended(cluster, job):
        of_job = processes_of(cluster, job)
        most = max(most, sum(has_open(process, sheet) for process in of_job))
    assert texts(checkout)[1] == ""
    assert most == count  # and the one that waits for them has closed it


def test_module_in_place_of_venv(cluster, checkout):
    (checkout / ".venv").unlink()
    (task,) = run(cluster, checkout, "sbatch batch_job_simple.sh")
    assert (task["JobState"], texts(checkout)[1]) == ("COMPLETED", "")
    assert results(checkout) == names(SHEETS[:1])


@pytest.mark.parametrize("batch_file", [SIMPLE, MULTI, ARRAY])
def test_neither_venv_nor_module(cluster, checkout, batch_file):
    (checkout / ".venv").unlink()
    cluster = cluster | {"MODULEPATH": ""}
    options = "--array=1 --error=err.txt --output=out.txt"
    (task,) = run(cluster, checkout, f"sbatch {options} {batch_file}")
    assert (task["JobState"], task["ExitCode"]) == ("FAILED", "1:0")
    wanted = (
        "No Python with rasterio: make .venv as README says, or load a module here\n"
    )
    assert texts(checkout) == ("", wanted)


@pytest.mark.parametrize("batch_file", [SIMPLE, MULTI, ARRAY])
def test_folder_of_ones_own(cluster, tmp_path, batch_file):
    clone = tools.copy_tracked(tmp_path / "the clone")
    (clone / ".venv").symlink_to(sys.prefix)
    folder = tmp_path / "my project"
    folder.mkdir()
    tools.write_raster(folder / "my dem.tif", np.ones((1, 30, 40), np.float32))
    (folder / "list.txt").write_text("my dem.tif\n")
    (folder / "copy.py").write_text("1 / 0")  # not to be taken for Python's own
    argument = "list.txt" if batch_file == ARRAY else "my dem.tif"
    options = ["--wait", "--array=1", "--output=out.txt", "--error=err.txt"]

    command = ["sbatch", *options, clone / batch_file, argument, "3"]
    done = subprocess.run(command, cwd=folder, env=cluster, check=False)
    (message,) = texts(folder)[1].splitlines()
    assert (done.returncode, texts(folder)[0]) == (1, "")
    # What it says to type, with its path and blank, is all that there is to do.
    link = message[message.index("ln -s ") :].replace("/path/to/clone", f"'{clone}'")
    subprocess.run(["bash", "-c", link], cwd=folder, check=True)
    ask(cluster, "sbatch", *options, batch_file, argument, "3", cwd=folder)
    assert texts(folder)[1] == ""
    assert [path.name for path in (folder / "smooth").iterdir()] == ["my dem.tif"]
    assert tools.files(clone / "smooth") == [".gitignore"]


@pytest.mark.parametrize("batch_file", [SIMPLE, MULTI])
def test_raster_and_window_as_arguments(cluster, checkout, batch_file):
    run(cluster, checkout, f"sbatch {batch_file} {SHEETS[2]} 5")
    out, err = texts(checkout)
    assert ("window 5 x 5" in out, err) == (True, "")
    assert results(checkout) == names(SHEETS[2:3])


@pytest.mark.parametrize(
    ("array", "lines", "left"),
    [
        ("1-4:2", [[1, 2], [3, 4]], ""),
        ("1,3", [[1], [3]], "4-4:1"),
        ("3-4%1", [[3], [4]], ""),
        ("2-3", [[2], [3]], "4-4:1"),
        ("1-2:3", [[1, 2, 3]], "4-4:3"),
    ],
)
def test_lines_of_each_task(cluster, checkout, array, lines, left):
    tasks = run(cluster, checkout, f"sbatch --array={array} array_job.sh")
    assert states(tasks) == ["COMPLETED"] * len(lines)
    outs = [Path(task["StdOut"]).read_text() for task in tasks]
    for out, wanted in zip(outs, lines, strict=True):
        done = re.findall(r"^(smooth/\S+): ", out, re.MULTILINE)
        assert done == [f"smooth/{Path(SHEETS[line - 1]).name}" for line in wanted]
    assert results(checkout) == names(SHEETS[n - 1] for some in lines for n in some)
    told = re.findall(
        r"^mapsheets.txt: .* (--array=\S+) ...$", "".join(outs), re.MULTILINE
    )
    assert told == [f"--array={left}"] * bool(left)
    if left:  # what it says to do blurs the rest
        assert "no task does lines" in outs[-1]
        tasks = run(cluster, checkout, f"sbatch {told[0]} array_job.sh")
        assert set(states(tasks)) == {"COMPLETED"}
        assert names(SHEETS[3:])[0] in results(checkout)


def test_array_again_for_what_is_missing(cluster, checkout):
    (checkout / "list.txt").write_text("\n".join([*SHEETS, "late.tif"]))
    command = "sbatch --array=1-5%2 array_job.sh list.txt 5 --missing"
    tasks = run(cluster, checkout, command)
    assert states(tasks) == ["COMPLETED"] * 4 + ["FAILED"]
    tools.write_raster(checkout / "late.tif", np.ones((1, 30, 40), np.float32))
    tasks = run(cluster, checkout, command)
    assert states(tasks) == ["COMPLETED"] * 5
    outs = [Path(task["StdOut"]).read_text() for task in tasks]
    skipped = [f"{sheet}: skipped, as its result is there\n" for sheet in SHEETS]
    assert outs[:-1] == skipped
    assert outs[-1].startswith("smooth/late.tif: ")


def test_array_from_line_0(cluster, checkout):
    tasks = run(cluster, checkout, "sbatch --array=0-1 array_job.sh")
    assert states(tasks) == ["FAILED", "COMPLETED"]
    message = "mapsheets.txt, line 0: no raster there, use --array=1-4\n"
    errors = [Path(task["StdErr"]).read_text() for task in tasks]
    assert errors == [message, ""]


def test_raster_in_place_of_a_list(cluster, checkout, sheet):
    tasks = run(cluster, checkout, f"sbatch array_job.sh {sheet}")
    assert states(tasks) == ["FAILED"] * 2
    for task in tasks:
        assert Path(task["StdOut"]).read_text() == ""
        (message,) = Path(task["StdErr"]).read_text().splitlines()
        assert message.startswith(f"{sheet}: not a list, ")


def test_options_on_the_command_line_win(cluster, checkout):
    options = "--partition=test --time=2 --mem-per-cpu=200 --cpus-per-task=2"
    (task,) = run(cluster, checkout, f"sbatch {options} batch_job_simple.sh")
    assert task["JobState"] == "COMPLETED"
    assert (task["Partition"], task["TimeLimit"]) == ("test", "00:02:00")
    assert (task["MinMemoryCPU"], task["NumCPUs"]) == ("200M", "2")


@pytest.mark.parametrize("window", [15, 51])
@pytest.mark.parametrize("cpus", [1, 4, 8])
def test_no_job_on_a_large_raster_is_killed(cluster, checkout, large, cpus, window):
    """Each on its own, as all would be too many for this computer at a time."""
    command = f"sbatch --cpus-per-task={cpus} --time=10 {MULTI} {large} {window}"
    (task,) = run(cluster, checkout, command)
    assert (task["JobState"], texts(checkout)[1]) == ("COMPLETED", "")
    assert task["MinMemoryCPU"] == "300M"


def test_sheet_fits_the_request(cluster, checkout, sheet):
    # A large window takes more time, and no less memory: Slurm looks once a second.
    (task,) = run(cluster, checkout, f"sbatch {SIMPLE} {sheet} 301")
    assert (task["JobState"], texts(checkout)[1]) == ("COMPLETED", "")
    assert task["MinMemoryCPU"] == "300M"


def check_killed(cluster, folder, command):
    """Check that Slurm kills a job for its memory and that it leaves no result."""
    (task,) = run(cluster, folder, command)
    if task["JobState"] == "COMPLETED" and not tools.sees_memory(cluster):
        pytest.skip("this Slurm sees no memory use, so that it kills no job for it")
    assert task["JobState"] not in ("COMPLETED", "TIMEOUT")
    out, err = texts(folder)
    assert ("smooth/" in out, err != "") == (False, True)


def test_half_of_the_request_is_too_little(cluster, checkout, large):
    options = "--cpus-per-task=1 --mem-per-cpu=150 --time=10"
    check_killed(cluster, checkout, f"sbatch {options} {MULTI} {large} 51")


@pytest.mark.parametrize(("batch_file", "mb"), [(SIMPLE, 120), (MULTI, 80)])
def test_too_small_memory_request(cluster, checkout, sheet, batch_file, mb):
    """The job is killed, and does well with the option that it was told."""
    check_killed(
        cluster, checkout, f"sbatch --mem-per-cpu={mb} {batch_file} {sheet} 601"
    )
    option = re.search(r": warning: needs .* sbatch (\S+) ", texts(checkout)[1])[1]
    (task,) = run(cluster, checkout, f"sbatch {option} {batch_file} {sheet} 601")
    assert (task["JobState"], texts(checkout)[1]) == ("COMPLETED", "")
    assert "sheet.tif" in results(checkout)


def test_the_two_batch_files_differ_in_names_and_cpus():
    simple, multi = [(tools.ROOT / name).read_text() for name in (SIMPLE, MULTI)]
    simple = simple.replace("--cpus-per-task=1", "--cpus-per-task=4")
    simple = simple.replace("batch_job_simple", "batch_job_multiprocessing")
    simple = simple.replace("simple_focal", "multiprocessing_focal")
    assert simple.replace("jacksboro_nw.tif", "jacksboro.vrt") == multi


def check_stopped(cluster, folder, job, command, tall):
    """Check that a stopped job has left nothing, and that the next run succeeds."""
    assert "stopped, no result" in texts(folder)[1]
    tools.wait_until(lambda: not processes_of(cluster, job))
    assert results(folder) == []
    tools.write_raster(tall, np.ones((1, 20, 20), np.float32))  # a fast one
    (task,) = run(cluster, folder, command)
    assert (task["JobState"], texts(folder)[1]) == ("COMPLETED", "")
    assert "tall.tif" in results(folder)


@pytest.mark.parametrize(
    "job_and_raster",
    [
        "batch_job_simple.sh {}",
        "batch_job_multiprocessing.sh {}",
        "--array=1-2:2 --output=out.txt --error=err.txt array_job.sh list.txt",
    ],
)
def test_cancelled_while_writing(cluster, checkout, tall, job_and_raster):
    (checkout / "list.txt").write_text(f"{tall}\n{SHEETS[0]}\n")
    command = f"sbatch --mem-per-cpu=2000 {job_and_raster}".format(tall)
    job = submit(cluster, checkout, f"{command} 1")
    tools.wait_until(lambda: drafts(checkout))
    ask(cluster, "scancel", job)
    (task,) = tools.wait_until(lambda: ended(cluster, job))
    assert task["JobState"] == "CANCELLED"
    check_stopped(cluster, checkout, job, command, tall)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("auth", ["auth/munge", "auth/none"])
def test_nobody_else_can_submit(cluster, public, auth):
    settings = Path(cluster["SLURM_CONF"]).read_text().replace("auth/munge", auth)
    (public / "slurm.conf").write_text(
        settings + "CredType=cred/none\n" * ("none" in auth)
    )
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", "sbatch", "--wrap=true"],
        cwd=public,
        env=cluster | {"SLURM_CONF": str(public / "slurm.conf")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "submission failed" in done.stderr, done


def test_out_of_time(cluster, late_job):
    job, folder, command, raster = late_job
    (task,) = tools.wait_until(lambda: ended(cluster, job))
    assert (task["JobState"], task["Reason"]) == ("TIMEOUT", "TimeLimit")
    check_stopped(cluster, folder, job, command, raster)
