"""array_job.sh blurs the rasters of its lines, each of them, and no others."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tools import LIMIT, NAMES, ROOT, SIMPLE, check_silent, files


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


def test_no_name_in_a_list_is_refused_or_executed(job, small):
    run_job, folder = job
    (folder / "mapsheets.txt").write_text("\n".join(NAMES))
    for name in NAMES:
        shutil.copy(small, folder / name)
    before = files(folder)
    done = run_job(1, step=100)
    check_silent(done)
    results = {str(Path(name).with_suffix(".tif")) for name in NAMES}
    assert set(files(folder)) - set(before) == {
        "smooth",
        *(f"smooth/{name}" for name in results),
    }


def test_no_name_of_a_list_is_refused_or_executed(job, small):
    run_job, folder = job
    for name in ("it's a $(touch executed) list.txt", "-list.txt"):
        (folder / name).write_text(f"{small}\n")
        done = run_job(1, name, 3)
        check_silent(done)
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
def test_last_line_of_a_list_is_blurred(job, small, text, line):
    run_job, folder = job
    (folder / "mapsheets.txt").write_text(text.format(small=small), newline="")
    done = run_job(line, step=7)
    check_silent(done)
    assert files(folder / "smooth") == ["small.tif"]


@pytest.mark.parametrize(
    "line, message",
    [("b.tif", "b.tif: "), ("", "mapsheets.txt, line 2: empty")],
)
def test_rasters_after_one_that_fails_are_blurred(job, small, line, message):
    run_job, folder = job
    (folder / "mapsheets.txt").write_text(f"a.tif\n{line}\nc.tif\n")
    for name in ("a.tif", "c.tif"):
        shutil.copy(small, folder / name)
    done = run_job(1, step=10)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(message)
    assert files(folder / "smooth") == ["a.tif", "c.tif"]


@pytest.mark.parametrize("line", [2, 4, 5])
def test_line_without_a_raster_is_named(job, small, line):
    run_job, folder = job
    (folder / "list.txt").write_text(f"{small}\n\nother.tif\n\n")
    done = run_job(line, "list.txt")
    assert done.returncode != 0
    (message,) = done.stderr.splitlines()
    assert message.startswith(f"list.txt, line {line}: ")
    assert not (folder / "smooth").exists()


@pytest.mark.parametrize("twin", ["{folder}/other/small.tif", "small.vrt\r"])
def test_two_rasters_do_not_overwrite_each_others_result(job, small, twin):
    run_job, folder = job
    twin = twin.format(folder=folder)
    (folder / "mapsheets.txt").write_text(f"{small}\n{twin}\n", newline="")
    done = run_job(1)
    assert done.returncode != 0
    (message,) = done.stderr.splitlines()
    assert str(small) in message and twin.strip() in message
    assert not (folder / "smooth").exists()
