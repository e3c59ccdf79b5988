"""How the scripts are called, the form of their code, and the sample data."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import rasterio
from runs import ROOT, SCRIPTS, check_silent, files, need

TEXTS = [script.read_text() for script in SCRIPTS]
TREES = [ast.parse(text) for text in TEXTS]
DOCSTRINGS = [ast.get_docstring(tree) for tree in TREES]


def test_help_tells_how_to_call_the_script(run_both):
    for script, text, (cwd, done) in zip(SCRIPTS, DOCSTRINGS, run_both("--help")):
        check_silent(done)
        assert text in done.stdout
        assert f"python {script.name} RASTER [WINDOW]" in text
        assert files(cwd) == []


NUMBERS = [(["x.tif", number], "odd number") for number in ("4", "0", "-3")]
WORDS = [(["x.tif", word], word) for word in ("3.0", "²", "many", "--much")]
OTHERS = [([], "raster"), (["x.tif", ""], "window"), (["x.tif", "3", "much"], "much")]


@pytest.mark.parametrize("arguments, problem", NUMBERS + WORDS + OTHERS)
def test_wrong_call_is_explained(run_both, arguments, problem):
    """The raster is missing: to open it first would fail with 1."""
    for text, (cwd, done) in zip(DOCSTRINGS, run_both(*arguments)):
        assert done.returncode == 2, done
        assert text in done.stderr
        assert problem in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert (done.stdout, files(cwd)) == ("", [])


def test_shared_code_is_the_same_text():
    """All of the simple script but its docstring, its imports and main."""
    simple, multi = TEXTS
    for first, end in ("RASTER is", '"""'), ("# pieces: ", "def main("):
        assert simple[simple.index(first) : simple.index(end, 9)] in multi
    shared = simple[simple.index("def blur_piece(") :]
    assert multi.endswith("\n\n\n" + shared)
    assert len(shared) > len(simple) * 0.7


@pytest.mark.parametrize("tree", TREES)
def test_scripts_read_downwards(tree):
    """From main on, no function uses one that stands above it."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert functions[0].name == "main"
    above = set()
    for function in functions:
        names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        assert not names & above, function.name
        above.add(function.name)


def test_scripts_import_nothing_but_the_three_packages():
    allowed = sys.stdlib_module_names | {"rasterio", "numpy", "scipy"}
    for text in TEXTS:
        lines = re.findall(r"(?m)^\s*(?:import|from) (\w+)", text)
        assert len(lines) > 10
        assert set(lines) <= allowed


SHELL = ["shellcheck --exclude=SC1091 *.sh tests/run.sh .ci/run"]
SHELL += ["shellcheck tests/slurm/*.sh", "codespell --skip ./.git,./.venv*,./smooth ."]


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", *SHELL])
def test_form(command):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    need(command.split()[0], path=path)
    command = f"cd '{ROOT}' && PATH='{path}' {command} 2>&1"
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, check=False)
    assert done.returncode == 0, done.stdout.decode()


def test_sample_data_is_what_its_page_says():
    """Elevations of matplotlib, in four sheets without a gap; ymin is the first row's."""
    folder = Path(mpl.get_data_path(), "sample_data")
    source = np.load(folder / "jacksboro_fault_dem.npz")
    with rasterio.open(ROOT / "tests/data/jacksboro.vrt") as raster:
        np.testing.assert_array_equal(raster.read(1), source["elevation"])
        assert (raster.crs, raster.nodata) == ("EPSG:4326", -32768)
        sheets = {os.path.relpath(path, ROOT) for path in raster.files[1:]}
    assert sheets == set((ROOT / "mapsheets.txt").read_text().split())
