"""A wrong call says what is wrong; a name is a name, whatever characters it has."""

import ast
import shutil

import pytest
from tools import NAMES, SCRIPTS, check_silent, files

DOCSTRINGS = [ast.get_docstring(ast.parse(script.read_text())) for script in SCRIPTS]


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_tells_how_to_call_the_script(run_both, option):
    for script, text, (cwd, done) in zip(SCRIPTS, DOCSTRINGS, run_both(option)):
        check_silent(done)
        assert text in done.stdout
        assert f"python {script.name} RASTER [WINDOW]" in text
        assert files(cwd) == []


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ([], "raster"),
        (["3", "much"], "much"),
        (["--much"], "--much"),
        (["4"], "odd number"),
        (["0"], "odd number"),
        (["-3"], "odd number"),
        (["3.0"], "3.0"),
        (["1e1"], "1e1"),
        (["²"], "²"),
        ([""], "window"),
        (["many"], "many"),
    ],
)
def test_wrong_call_is_explained(tmp_path, run_both, arguments, problem):
    """The raster is missing: to open it first would fail with 1."""
    raster = [tmp_path / "missing.tif"] if arguments else []
    for text, (cwd, done) in zip(DOCSTRINGS, run_both(*raster, *arguments)):
        assert done.returncode == 2, done
        assert text in done.stderr
        assert problem in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert (done.stdout, files(cwd)) == ("", [])


@pytest.mark.parametrize("name", NAMES[:-1])
def test_no_name_is_refused_or_executed(tmp_path, run_both, small, name):
    for script in SCRIPTS:
        (tmp_path / script.stem).mkdir()
        shutil.copy(small, tmp_path / script.stem / name)
    for cwd, done in run_both(*["--"] * name.startswith("-"), name):
        check_silent(done)
        assert files(cwd) == sorted([name, "smooth", f"smooth/{name}"])
