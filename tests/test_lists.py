"""array_job.sh blurs the raster that stands in the line of its task, and no other."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from runs import NAMES, ROOT, SIMPLE, files, run

LIST = "-it's a $(touch executed) list.txt"
# In place of Python, where only what it is given matters: it says that, and fails.
STAND_IN = '#!/bin/sh\nprintf "<%s>" "$@"; exit 3\n'


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return a function that starts array_job.sh for a task, in the test's folder."""
    monkeypatch.chdir(tmp_path)
    Path(".venv/bin").mkdir(parents=True)
    Path(".venv/bin/activate").write_text('PATH="$PWD/.venv/bin:$PATH"')
    Path(".venv/bin/python").write_text(STAND_IN)
    Path(".venv/bin/python").chmod(0o755)

    def start_task(*arguments, task, **variables):
        env = os.environ | {"SLURM_ARRAY_TASK_ID": str(task)} | variables
        command = ["bash", ROOT / "array_job.sh", *arguments]
        utf8 = {"encoding": "utf-8", "errors": "surrogateescape"}
        return run(*command, env=env, **utf8)

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
    runs = [start(task=number) for number in range(1, len(NAMES) + 2)]
    assert [done.returncode for done in runs] == [0] * len(NAMES) + [1], runs
    assert not any(done.stderr for done in runs[:-1])
    assert runs[-1].stderr.startswith(f"{twin}: it would overwrite")
    results = {f"smooth/{Path(name).with_suffix('.tif')}" for name in NAMES}
    assert set(files(".")) - set(before) == {"smooth", *results}


# What in the user's own surroundings must change nothing.
FUNCTIONS = {f"BASH_FUNC_{name}%%": "() { exit 7; }" for name in ("sed", "python")}
SURROUNDINGS = {"failed": "3", "raster": "x", "list": "x", "IFS": "t", **FUNCTIONS}


@pytest.mark.parametrize(
    ("text", "task", "name"),
    [
        ("a.tif\nb c.tif\nc.tif", 2, "b c.tif"),
        ("a.tif\nb.tif\nc.tif", 3, "c.tif"),  # without an end of the line
        ("a.tif\r\nb.tif\r\n", 2, "b.tif"),
        ("j\udce4rvi.tif\n", 1, "j\udce4rvi.tif"),  # Latin 1
    ],
)
def test_line_of_a_task(start, text, task, name):
    Path(LIST).write_bytes(text.encode(errors="surrogateescape"))
    done = start(LIST, "3", task=task, **SURROUNDINGS)
    assert done.stdout == f"<simple_focal_mean.py><--><{name}><3>"
    assert (done.returncode, done.stderr) == (3, "")
    assert "executed" not in files(".")


@pytest.mark.parametrize("task", [0, 2, 3, 5])
def test_line_without_a_raster_is_one_error(start, task):
    Path(LIST).write_text("a.tif\n\n \t\r\nd.tif\n")
    for name in (LIST, "no such list", "."):
        done = start(name, task=task)
        line = f"{name}, line {task}: no raster there, or no such list\n"
        assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
