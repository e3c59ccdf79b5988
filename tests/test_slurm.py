"""The batch files on a real Slurm cluster of three nodes, which tests/slurm starts."""

import difflib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasters
import runs

SIMPLE, MULTI = "batch_job_simple.sh", "batch_job_multiprocessing.sh"
ARRAY = "array_job.sh"
LOGS = "--output=out.txt --error=err.txt"
SHEETS = [f"jacksboro_{corner}.tif" for corner in ("nw", "ne", "sw", "se")]


@pytest.fixture(scope="module", autouse=True)
def late_job(cluster, tmp_path_factory):
    """Let a job have no time left: Slurm sees it within 30 seconds, while it sleeps."""
    jobs = submit_slow(cluster, tmp_path_factory.mktemp("late"), MULTI)
    (job,) = jobs
    # Slurm's shortest limit is a minute, but the end can be moved.
    ask(cluster, "scontrol", "update", f"job={job}", "EndTime=now+1")
    for process in processes_of(cluster, job):
        os.kill(int(process.name), signal.SIGSTOP)
    return jobs


def checkout(folder):
    """Copy what git tracks to a folder, with .venv; return the folder."""
    runs.copy_tracked(folder)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def submit_slow(cluster, place, *batch_files):
    """Submit jobs, wait until they write; return the folder and command of each."""
    jobs = {}
    for batch_file in batch_files:
        folder = checkout(place / str(len(jobs)))
        raster = rasters.write_zeros(folder / "slow.tif", 3000, 40000)
        (folder / "list.txt").write_text(f"{raster}\ntests/data/{SHEETS[0]}\n")
        argument = "list.txt" if ARRAY in batch_file else raster
        command = f"sbatch --mem-per-cpu=2000 {batch_file} {argument}"
        jobs[submit(cluster, folder, f"{command} 201")] = folder, command
    drafts = "*/smooth/*.unfinished/*.tif"
    runs.wait_until(lambda: len(list(place.glob(drafts))) == len(jobs))
    return jobs


def ask(cluster, *command, cwd=None):
    """Run one of Slurm's programs; return what it prints."""
    return subprocess.check_output(command, cwd=cwd, env=cluster, text=True)


def submit(cluster, folder, command):
    """Type a command in a folder, which must submit a job; return the job's number."""
    answer = ask(cluster, *shlex.split(command), cwd=folder)
    return re.fullmatch(r"Submitted batch job (\d+)\n", answer)[1]


def ended(cluster, job):
    """Return what Slurm knows about a job's tasks once all have ended, else False."""
    lines = ask(cluster, "scontrol", "--oneliner", "show", "job", job).splitlines()
    tasks = [dict(re.findall(r"(\S+?)=(.*?)(?= \S+=|$)", line)) for line in lines]
    going = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"}
    return not going & {task["JobState"] for task in tasks} and tasks


def wait_for(cluster, *jobs):
    """Wait until jobs have ended; return what Slurm knows about each task."""
    ends = [runs.wait_until(lambda job=job: ended(cluster, job)) for job in jobs]
    return [task for tasks in ends for task in tasks]


def run(cluster, *folders_and_commands):
    """Submit jobs, then wait for their ends; return what Slurm knows of each task."""
    return wait_for(cluster, *[submit(cluster, *each) for each in folders_and_commands])


def check_good(tasks):
    """Check that tasks have done well, without a word of error."""
    for task in tasks:
        ending = task["JobState"], task["ExitCode"], Path(task["StdErr"]).read_text()
        assert ending == ("COMPLETED", "0:0", ""), task


def results(folder):
    """Return the names of all in folder smooth, hidden or not, but .gitignore."""
    return sorted(set(os.listdir(folder / "smooth")) - {".gitignore"})


def texts(folder):
    """Return what the job wrote to out.txt and to err.txt."""
    return (folder / "out.txt").read_text(), (folder / "err.txt").read_text()


def processes_of(cluster, job):
    """Return the folders in /proc of a job's processes, even if Slurm lost them."""
    place = f"SLURM_CONF={cluster['SLURM_CONF']}"
    return runs.processes(place, f"SLURM_JOB_ID={job}\0")


def test_batch_jobs(cluster, tmp_path):
    simple, multi, other, module = (checkout(tmp_path / str(i)) for i in range(4))
    (module / ".venv").unlink()
    options = "--partition=test --time=2 --mem-per-cpu=200 --cpus-per-task=2"
    tasks = run(
        cluster,
        (simple, f"sbatch {SIMPLE}"),
        (multi, f"sbatch {MULTI}"),
        (other, f"sbatch {options} {SIMPLE} tests/data/jacksboro.vrt"),
        (module, f"sbatch {SIMPLE}"),
    )
    check_good(tasks)
    asked = "Partition", "TimeLimit", "NumCPUs", "MinMemoryCPU"
    assert [[task[item] for item in asked] for task in tasks[:3]] == [
        ["serial", "00:01:00", "1", "500M"],
        ["serial", "00:01:00", "4", "500M"],
        ["test", "00:02:00", "2", "200M"],
    ]
    raster = simple / "tests/data/jacksboro.vrt"
    direct = rasters.read(runs.blur(runs.SIMPLE, raster, cwd=tmp_path))
    for folder in (simple, multi, other, module):
        (result,) = (folder / "smooth").glob("*.tif")
        assert rasters.read(result).tobytes() == direct.tobytes(), result
        assert f"smooth/{result.name}: " in texts(folder)[0]


def test_variables_of_the_terminal_win_over_the_batch_files(cluster, tmp_path):
    folder = checkout(tmp_path / "checkout")
    variables = {"SBATCH_ACCOUNT": "project_2000000", "SBATCH_PARTITION": "test"}
    account, user = variables["SBATCH_ACCOUNT"], ask(cluster, "id", "-un").strip()
    ask(cluster, "sacctmgr", "-i", "add", "account", account)
    ask(cluster, "sacctmgr", "-i", "add", "user", user, f"account={account}")
    for batch_file in (SIMPLE, MULTI, ARRAY):
        job = submit(cluster | variables, folder, f"sbatch {batch_file}")
        for task in wait_for(cluster, job):
            asked = task["Account"], task["Partition"], task["JobState"]
            assert asked == (account, "test", "COMPLETED"), batch_file


def test_folder_of_ones_own(cluster, tmp_path):
    clone, folder = checkout(tmp_path / "the clone"), tmp_path / "my project"
    folder.mkdir()
    command = f"cp '{clone}'/*.{{py,sh}} . && ln -s '{clone}/.venv' ."
    subprocess.run(["bash", "-c", command], cwd=folder, check=True)
    raster = rasters.write_raster(folder / "my dem.tif", np.ones((1, 30, 40)))
    (folder / "my list.txt").write_text("my dem.tif\n")
    arguments = {SIMPLE: raster.name, MULTI: raster.name, ARRAY: "my list.txt"}
    other = cluster | {"PROJ_DATA": str(tmp_path)}  # as a module sets it
    for batch_file, argument in arguments.items():
        command = f"sbatch {LOGS} --array=1 {batch_file} '{argument}' 3"
        check_good(run(other, (folder, command)))
        assert "window 3 x 3" in texts(folder)[0]
        assert rasterio.open(folder / "smooth/my dem.tif").crs == "EPSG:3067"
        assert results(folder) == ["my dem.tif"], batch_file
        (folder / "smooth/my dem.tif").unlink()
    assert runs.files(clone / "smooth") == [".gitignore"]


@pytest.mark.parametrize("batch_file", [SIMPLE, MULTI, ARRAY])
def test_what_is_missing_is_named(cluster, tmp_path, batch_file):
    """Python, with a module system and without, then the script."""
    folder = checkout(tmp_path / "checkout")
    (folder / ".venv").unlink()
    job = folder, f"sbatch {LOGS} --array=1 {batch_file}"
    (task,) = run(cluster | {"MODULEPATH": ""}, job)
    err = texts(folder)[1]
    assert task["JobState"] == "FAILED" and '"geo-env"' in err
    assert re.search("python: .*not found|No module named", err)
    command = f"cd {folder} && env -i SLURM_ARRAY_TASK_ID=1 bash {batch_file}"
    assert "module: command not found" in subprocess.getoutput(command)
    (folder / ".venv").symlink_to(sys.prefix)
    script = folder / (runs.MULTI if batch_file == MULTI else runs.SIMPLE).name
    script.unlink()
    (task,) = run(cluster, job)
    assert task["JobState"] == "FAILED"
    (message,) = texts(folder)[1].splitlines()
    assert f"can't open file '{script}': [Errno 2] No such file" in message


def test_as_many_processes_as_cpus(cluster, tmp_path):
    raster, jobs = rasters.write_zeros(tmp_path / "sheet.tif", 3000, 3000), {}
    for count, options in (4, ""), (3, "--cpus-per-task=3 "):
        folder = checkout(tmp_path / str(count))
        job = submit(cluster, folder, f"sbatch {options}{MULTI} {raster} 201")
        jobs[job] = count + 1  # with the one that waits for them, and no shell
    most = dict.fromkeys(jobs, 0)
    while not all(ended(cluster, job) for job in jobs):
        for job in jobs:
            most[job] = max(most[job], len(processes_of(cluster, job)))
    assert most == jobs
    check_good(wait_for(cluster, *jobs))


def test_too_small_memory_request(cluster, tmp_path):
    """Jobs are killed, leave no result, and do well with the option that they told."""
    raster = rasters.write_zeros(tmp_path / "sheet.tif", 3000, 1500)
    folders = [checkout(tmp_path / str(number)) for number in range(3)]
    files = SIMPLE, MULTI, f"--cpus-per-task=1 {MULTI}"

    def run_all(*options):
        commands = [f"sbatch {o} {f} {raster} 401" for o, f in zip(options, files)]
        return run(cluster, *zip(folders, commands))

    tasks = run_all("--mem-per-cpu=100", "--mem-per-cpu=80", "--mem-per-cpu=150")
    if runs.sees_memory(cluster):
        assert not {"COMPLETED", "TIMEOUT"} & {task["JobState"] for task in tasks}
        assert not any("smooth/" in texts(folder)[0] for folder in folders)
    told = f"{raster}: low memory, sbatch (--mem-per-cpu=.*)\n"
    options = [re.search(told, texts(folder)[1])[1] for folder in folders]
    check_good(run_all(*options))
    assert all("sheet.tif" in results(folder) for folder in folders)


def test_the_two_batch_files_differ_in_names_and_cpus():
    """And in the remark on srun."""
    simple, multi = [(runs.ROOT / n).read_text().splitlines() for n in (SIMPLE, MULTI)]
    lines = [line for line in difflib.ndiff(simple, multi) if line[0] in "-+"]
    words = "job-name", "cpus-per-task", "exec python", "srun"
    assert all(any(word in line for word in words) for line in lines), lines
    assert len(lines) == 7


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_nobody_else_can_submit(cluster, public):
    """Though they write a slurm.conf of their own that asks for no authentication."""
    text = Path(cluster["SLURM_CONF"]).read_text()
    text = text.replace("auth/munge", "auth/none\nCredType=cred/none")
    (public / "slurm.conf").write_text(text)
    command = "setpriv --reuid=65534 --clear-groups sbatch --wrap=true"
    command = f"cd {public} && SLURM_CONF={public}/slurm.conf {command}"
    code, output = subprocess.getstatusoutput(command)
    assert code == 1 and "submission failed" in output, output


def test_stopped_jobs_leave_nothing(cluster, tmp_path, late_job):
    """While they write, cancelled or out of time; the next ones succeed."""
    files = SIMPLE, MULTI, f"--array=1 {LOGS} {ARRAY}"
    jobs = submit_slow(cluster, tmp_path, *files)
    ask(cluster, "scancel", *jobs)
    jobs |= late_job
    states = [task["JobState"] for task in wait_for(cluster, *jobs)]
    assert states == ["CANCELLED"] * 3 + ["TIMEOUT"]
    for job, (folder, _) in jobs.items():
        assert "slow.tif: stopped, no result\n" in texts(folder)[1]
        runs.wait_until(lambda job=job: not processes_of(cluster, job))
        assert results(folder) == []
        rasters.write_raster(folder / "slow.tif", np.ones((1, 20, 20), np.float32))
    check_good(run(cluster, *jobs.values()))
    assert all("slow.tif" in results(folder) for folder, _ in jobs.values())
