"""array_job.sh blurs the rasters of its lines, each of them, and no others."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tools import LIMIT, NAMES, ROOT, SIMPLE, files, need

# In place of Python, where only what it is given matters: it says that, or fails.
STAND_IN = """python() {
    printf "<%s>" "$@"; echo
    [ "$3" != bad.tif ] || { echo "bad.tif: no result" >&2; return 1; }
}"""
LIST = "-it's a $(touch executed) list.txt"
NONE = f"{LIST}, line %d: no raster there, use --array=1-3\n"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return a function that starts array_job.sh for a task, in the test's folder."""
    monkeypatch.chdir(tmp_path)
    Path(".venv/bin").mkdir(parents=True)
    Path(".venv/bin/activate").write_text(STAND_IN)

    def start_task(*arguments, **task):
        env = {f"SLURM_ARRAY_TASK_{name}": str(task[name]) for name in task}
        command = ["bash", ROOT / "array_job.sh", *arguments]
        options = {"capture_output": True, "timeout": LIMIT, "env": os.environ | env}
        options |= {"encoding": "utf-8", "errors": "surrogateescape"}
        return subprocess.run(command, check=False, **options)

    return start_task


def test_no_name_in_a_list_is_refused_or_executed(start, small):
    """The script itself gets them, and one more, whose result would replace another."""
    Path(".venv/bin/activate").write_text(f'PATH="{Path(sys.executable).parent}:$PATH"')
    Path("other").mkdir()
    twin = f"other/{NAMES[2]}"
    for name in (*NAMES, twin):
        shutil.copy(small, name)
    shutil.copy(SIMPLE, ".")
    Path("mapsheets.txt").write_text("\n".join([*NAMES, twin]))
    before = files(".")
    done = start(ID=1, STEP=100)
    (message,) = done.stderr.splitlines()
    assert done.returncode == 1 and message.startswith(f"{twin}: it would overwrite")
    assert len(done.stdout.splitlines()) == len(NAMES), done
    results = {f"smooth/{Path(name).with_suffix('.tif')}" for name in NAMES}
    assert set(files(".")) - set(before) == {"smooth", *results}


@pytest.mark.parametrize(
    ("text", "first", "step", "names", "errors"),
    [
        ("a.tif\nb.tif\nc.tif", 2, 2, ["b.tif", "c.tif"], ""),
        ("\ufeffa.tif\r\nb.tif\r\n  \n\t\n\r\n", 1, 7, ["a.tif", "b.tif"], ""),
        ("a.tif\nj\udce4rvi.tif\n", 1, 2, ["a.tif", "j\udce4rvi.tif"], ""),  # Latin 1
        ("bad.tif\nb.tif\n", 1, 2, ["bad.tif", "b.tif"], "bad.tif: no result\n"),
        ("a.tif\n\nc.tif", 1, 3, ["a.tif", "c.tif"], f"{LIST}, line 2: empty\n"),
        ("a.tif\n\nc.tif\n\n", 0, 1, [], NONE % 0),
        ("a.tif\n\nc.tif\n\n", 4, 1, [], NONE % 4),
    ],
)
def test_lines_of_a_task(start, text, first, step, names, errors):
    Path(LIST).write_bytes(text.encode(errors="surrogateescape"))
    done = start(LIST, "3", ID=first, STEP=step)
    printed = [f"<simple_focal_mean.py><--><{name}><3>\n" for name in names]
    assert (done.stdout, done.stderr) == ("".join(printed), errors)
    assert done.returncode == (errors != "")
    assert files(".") == sorted([LIST, ".venv", ".venv/bin", ".venv/bin/activate"])


def test_no_raster_follows_when_slurm_ends_the_job(start):
    """The shell is told at once, but lets Python clean up."""
    Path(".venv/bin/activate").write_text('python() { sh -c "kill $$; echo $3"; }')
    Path(LIST).write_text("a.tif\nb.tif\n")
    done = start(LIST, ID=1, STEP=2)
    assert (done.returncode, done.stdout) == (143, "a.tif\n"), done


def test_what_is_no_list_is_refused_in_a_line(start, small):
    need("gdal_translate")
    rasters = "a.tif", "b.nc", "c.png", "d.vrt"
    for name in rasters:
        subprocess.run(["gdal_translate", "-q", "-ot", "Byte", small, name], check=True)
    Path("my maps").mkdir()
    Path("blank.txt").write_text(" \n\n")
    Path("utf16").write_text("a.tif\n", "utf-16")
    says = "no such list, which is a text with a raster's path in each line"
    for name in (*rasters, "my maps", "none.txt", "blank.txt", "utf16"):
        done = start(name, ID=1, MAX=2)
        assert (done.returncode, done.stdout) == (1, ""), name
        assert done.stderr == f"{name}: {says}\n"
