"""array_job.sh blurs the rasters of its lines, each of them, and no others."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tools import (
    LIMIT,
    NAMES,
    ROOT,
    SIMPLE,
    check_silent,
    files,
    need,
    write_raster,
)


@pytest.fixture
def job(tmp_path):
    """Return a function that starts array_job.sh for a line, and its current folder."""
    folder = tmp_path / "job"
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("array_job.sh", SIMPLE.name):
        shutil.copy(ROOT / name, folder)
    python = Path(sys.executable).parent
    (folder / ".venv/bin/activate").write_text(f'PATH="{python}:$PATH"\n')

    def run_job(line, *arguments, step=1, **more):
        task = {"ID": line, "STEP": step} | more
        task = {f"SLURM_ARRAY_TASK_{name}": str(task[name]) for name in task}
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


@pytest.mark.parametrize("line", [0, 2, 4, 5])
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
    (folder / "other").mkdir()
    shutil.copy(small, folder / twin.strip())
    (folder / "mapsheets.txt").write_text(f"{small}\n{twin}\n", newline="")
    check_silent(run_job(1))
    before = (folder / "smooth/small.tif").read_bytes()
    done = run_job(2)
    assert (done.returncode, done.stdout) == (1, "")
    (message,) = done.stderr.splitlines()
    assert message.startswith(
        f"{twin.strip()}: its result would overwrite smooth/small"
    )
    assert (folder / "smooth/small.tif").read_bytes() == before


@pytest.mark.parametrize(
    "name",
    ["a.tif", "b.nc", "c.png", "d.vrt", "my maps", "none.txt", "", "utf16"],
)
def test_what_is_no_list_is_refused_in_a_line(job, small, name):
    need("gdal_translate")
    run_job, folder = job
    path = folder / (name or "blank.txt")
    if path.suffix in (".tif", ".nc", ".png", ".vrt"):
        options = ["-ot", "Byte", "-of", "VRT"] if name == "d.vrt" else ["-ot", "Byte"]
        subprocess.run(["gdal_translate", "-q", *options, small, path], check=True)
    elif name == "my maps":
        path.mkdir()
    elif name != "none.txt":
        path.write_text("a.tif\n" if name else " \n\n", "utf-16" if name else None)
    for line in (1, 2):
        done = run_job(line, path.name, MAX=2)
        assert (done.returncode, done.stdout) == (1, "")
        (message,) = done.stderr.splitlines()
        assert message.startswith(f"{path.name}: ") and "list" in message
        assert len(message) < 100
    assert not (folder / "smooth").exists()


def test_marks_of_windows_are_no_part_of_a_name(job, small):
    run_job, folder = job
    (folder / "list.txt").write_text(f"{small}\r\n", "utf-8-sig", newline="")
    check_silent(run_job(1, "list.txt"))
    assert files(folder / "smooth") == ["small.tif"]


def test_names_in_latin_1_do_not_hinder_others(job, small, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")  # as in most languages
    run_job, folder = job
    (folder / "list.txt").write_bytes(b"%b\nj\xe4rvi.tif\n" % os.fsencode(small))
    check_silent(run_job(1, "list.txt"))
    assert files(folder / "smooth") == ["small.tif"]


@pytest.mark.parametrize(
    ("first", "last", "step", "left", "option"),
    [
        (1, 9, 1, None, None),
        (1, 12, 1, None, None),
        (1, 7, 3, None, None),
        (0, 9, 1, None, None),
        (1, 2, 1, "3-9", "3-9:1"),
        (3, 4, 1, "5-9", "5-9:1"),
        (11, 12, 1, None, None),
        (1, 4, 3, "7-9", "7-9:3"),
        (1, 1, 1, "2-9", "2-9:1"),
    ],
)
def test_last_task_tells_which_lines_are_left(job, first, last, step, left, option):
    run_job, folder = job
    (folder / "list.txt").write_text("".join(f"{i}.tif\n" for i in range(1, 10)))
    limits = {"MAX": last, "step": step}
    text = f"list.txt: no task does lines {left}: sbatch --array={option} ...\n"
    assert run_job(last, "list.txt", **limits).stdout == (text if left else "")
    if left == "3-9":
        assert run_job(first, "list.txt", **limits).stdout == ""


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_missing_skips_what_has_a_result(job, small):
    run_job, folder = job
    names = [*NAMES, " in front.tif", f"{folder}/absolute.tif", "late.tif"]
    (folder / "mapsheets.txt").write_text("\n".join(names))
    for name in names[:-1]:
        shutil.copy(small, folder / name)
    write_raster(folder / names[0], np.ones((1, 20, 20)), transform=None)  # nowhere
    done = run_job(1, "mapsheets.txt", "--missing", step=100)
    assert (done.returncode, done.stderr.splitlines()[-1][:9]) == (1, "late.tif:")
    assert "skipped" not in done.stdout
    shutil.copy(small, folder / "late.tif")
    skipped = "{}: skipped, as its result is there".format
    for arguments in (["--missing"], [15, "--missing"]):
        done = run_job(1, "mapsheets.txt", *arguments, step=100)
        check_silent(done)
        lines = done.stdout.splitlines()
        paths = [f"./{name}" if name[0] == "-" else name for name in names]
        assert lines[:-1] == [skipped(path) for path in paths[:-1]]
        last = skipped("late.tif") if 15 in arguments else "smooth/late.tif: "
        assert lines[-1].startswith(last)


def make_newer(path):
    """Give a file an age that no result can have yet."""
    os.utime(path, (2**32, 2**32))


def test_missing_runs_again_what_has_changed(job, small):
    need("gdalbuildvrt", "gdal_translate")
    run_job, folder = job
    write = ["gdal_translate", "-q", "-of"]
    subprocess.run([*write, "netCDF", small, folder / "x.nc"], check=True)
    for name in ("a.tif", "b.tif", "c.tif"):
        shutil.copy(small, folder / name)
    mosaic = ["gdalbuildvrt", "-q", "d.vrt", "c.tif"]
    subprocess.run(mosaic, cwd=folder, check=True)
    names = ["a.tif", "b.tif", "netcdf:x.nc:Band1", "d.vrt"]
    (folder / "list.txt").write_text("\n".join(names))
    check_silent(run_job(1, "list.txt", 3, step=4))

    def run_again(*arguments):
        """Return the names that are not skipped."""
        done = run_job(1, *arguments, "--missing", step=4)
        check_silent(done)
        lines = done.stdout.splitlines()
        assert len(lines) == len(names)
        return [name for name, line in zip(names, lines) if line.startswith("smooth/")]

    assert run_again("list.txt", 3) == []
    assert run_again("list.txt", 5) == names
    assert run_again("list.txt") == names
    assert run_again("list.txt") == []
    (folder / "smooth/a.tif").unlink()
    make_newer(folder / "b.tif")
    assert run_again("list.txt") == names[:2]
    make_newer(folder / "x.nc")
    assert run_again("list.txt") == names[1:3]
    make_newer(folder / "c.tif")
    assert run_again("list.txt") == names[1:]


def test_missing_skips_no_sheet_for_a_result_of_another(job, small):
    run_job, folder = job
    for name in ("north", "south"):
        (folder / name).mkdir()
        shutil.copy(small, folder / name / "a.tif")
        (folder / f"{name}.txt").write_text(f"{name}/a.tif\n")
    check_silent(run_job(1, "north.txt"))
    assert "skipped" not in run_job(1, "south.txt", "--missing").stdout
    (folder / "smooth/a.tif").write_text("")
    assert "skipped" not in run_job(1, "north.txt", "--missing").stdout
