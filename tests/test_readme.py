"""README's commands are run in the order shown, and what it quotes is compared."""

import importlib.util
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import rowcol
from scipy import ndimage
from tools import (
    ROOT,
    SIMPLE,
    copy_tracked,
    need,
    sees_memory,
    wait_until,
    write_raster,
)

README = (ROOT / "README.md").read_text()
# A block: its language, a note behind it, its text. Or a command within a sentence.
PATTERN = r"^```(\w+)([^\n]*)\n(.*?)^```$|`(\w[^`\n]*\.sh\b[^`]*)`"
PARTS = [m.groups("") for m in re.finditer(PATTERN, README, re.MULTILINE | re.DOTALL)]
BLOCKS = [(language, note.strip(), text) for language, note, text, _ in PARTS]
ELSEWHERE = ("--account", "tests/run.sh")  # on Roihu; runs this page
# Slurm's shortest limit is a minute, but the end of a job can be moved.
HURRY = "until scontrol update jobname=wrap endtime=now+1; do sleep 0.1; done"
RECIPES = README[README.index("## Sheets that touch") : README.index("## Other clus")]


def blank(text):
    """Take out of a text what differs from run to run: seconds, job numbers, bytes.

    And from Slurm to Slurm: which of its programs tells an error.
    """
    text = re.sub(r"(?m)^\S+ (?=error: )", "", text)
    if "MaxRSS" in text:  # a table of sacct
        text = re.sub(r" +", " ", re.sub(r"\d[\d:.]*[KM]?", "N", text))
    text = re.sub(r"\d+\.\d seconds", "N seconds", text)
    # It says which result it replaces, if the page's commands have made one before.
    text = text.replace(", in place of an earlier result of window 15 x 15", "")
    text = re.sub(r"(batch job |StepId=|JOB )\d+", r"\1N", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:]+|\(\d+ >|\bc\d\b", "N", text)
    return [line.strip() for line in text.strip().splitlines()]


def type_in(command, folder, environment):
    """Run a command as a user would, and wait for its jobs; return what it printed."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (command, done)
    if "Submitted" in done.stdout:
        queue = ["squeue", "--noheader"]
        wait_until(lambda: not subprocess.check_output(queue, env=environment))
    for log in folder.glob("array_job_err_*.txt"):
        assert log.read_text() == "", command
    return done.stdout


def check_seamless(folder):
    """Check that the three ways have led to the same means; return them."""
    with rasterio.open(folder / "smooth/all.tif") as mosaic:
        means, place = mosaic.read(1), mosaic.transform
    assert np.isfinite(means[7:-7, 7:-7]).all()
    for name in ("joined.vrt", "joined_parts.vrt"):  # they reach over the edges
        with rasterio.open(folder / name) as joined:
            row, column = rowcol(joined.transform, place.c, place.f, op=round)
            values = joined.read(1)[row : row + len(means)]
        values = values[:, column : column + means.shape[1]]
        assert values.tobytes() == means.tobytes()
    return means


def test_commands_in_their_order(cluster, tmp_path):
    """Cluster is not used, but where it cannot start, README's cannot either."""
    need("gdalbuildvrt", "slurmdbd", "mariadbd")
    folder = copy_tracked(tmp_path / "checkout")
    path = f"{folder}/.venv/bin:{os.environ['PATH']}"  # as after activate
    short = tempfile.mkdtemp(dir="/tmp")  # for Slurm
    environment = os.environ | {"PATH": path, "TMPDIR": short}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "HOME": str(tmp_path)}
    command = output = ""
    try:
        for language, note, text, within in PARTS:
            if language == "text":
                if re.search("memory limit|MaxRSS", text) and not sees_memory(
                    environment
                ):
                    continue
                for _ in range(50 * ("sacct" in command)):  # the records come late
                    if blank(output) != blank(text):
                        time.sleep(0.2)
                        output = type_in(command, folder, environment)
                assert blank(output) == blank(text)
            elif within or language == "bash":
                command = " ".join(within.split()) or text
                if "sleep 3600" in command:
                    command = f"({HURRY}) &>/dev/null &\n{command}"
                if not any(word in command for word in ELSEWHERE):
                    output = type_in(command, folder, environment)
            if "start.sh" in text:
                environment |= dict(re.findall(r"export (\w+)=(.*)", output))
                stop = output.splitlines()[-1]
        check_seamless(folder)
        stop += "; echo ${SLURM_CONF-} ${MODULEPATH-}"
        assert type_in(stop, folder, environment).strip() == ""
    finally:
        for place in Path(short).glob("slurm.*"):
            subprocess.run(["bash", ROOT / "tests/slurm/stop.sh", place], check=False)
        os.rmdir(short)


def test_seamless_result_from_sheets_of_ones_own(cluster, tmp_path):
    """Without nodata, in a folder with a space in its name, with pixels of 2 m."""
    folder = copy_tracked(tmp_path / "checkout")
    environment = cluster | {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "my maps").mkdir()
    values = np.random.default_rng(0).integers(1, 900, (1, 200, 300), np.int16)
    for name, row, column in ("a", 0, 0), ("b", 0, 160), ("c", 90, 0), ("d.e", 90, 160):
        part = values[:, row : row + row // 9 * 2 + 90, column : column + 160]
        place = rasterio.Affine(2, 0, 500000 + 2 * column, 0, -2, 7000000 - 2 * row)
        write_raster(folder / "my maps" / f"{name}.tif", part, transform=place)
    type_in('ls "my maps"/*.tif > mapsheets.txt', folder, environment)
    recipes = RECIPES.replace("7 / 1200", "7 * 2")
    recipes = recipes.replace("=403 rows=344 part=172", "=300 rows=200 part=60")
    for match in re.finditer(PATTERN, recipes, re.MULTILINE | re.DOTALL):
        type_in(match[3], folder, environment)
    means = check_seamless(folder)
    kernel = np.full((15, 15), 1 / 225)
    expected = ndimage.convolve(values[0].astype(float), kernel)[7:-7, 7:-7]
    np.testing.assert_allclose(means[7:-7, 7:-7], expected, rtol=1e-5)
    assert np.isnan(means).sum() == means.size - expected.size


@pytest.mark.parametrize(
    ("note", "text"), [(note, text) for _, note, text in BLOCKS if note[:5] == "from "]
)
def test_excerpts_are_in_their_files(note, text):
    assert text in (ROOT / note.removeprefix("from ")).read_text()


def test_table_follows_the_rules():
    row = r"(?m)^\| (\d+) x \d+ \| (\d+) \| (\w+) \| `?(.*?)`? \|$"
    rows = re.findall(row, README)
    assert len(rows) == 5
    for side, window, script, options in rows:
        pixels = int(side) ** 2 / 1e6
        seconds = 0.5 + pixels * (0.03 + int(window) / 2000)
        memory, cpus = (160 + 4 * pixels, 1) if script == "simple" else (300, 4)
        wanted = [f"--mem-per-cpu={memory:.0f}"] * (memory > 300)
        minutes = math.ceil(2 * seconds / cpus / 60)
        wanted += [f"--time={minutes}"] * (minutes > 1)
        assert options == (" ".join(wanted) or "nothing")


def test_other_kernel_is_a_gaussian(tmp_path):
    (lines,) = [text for _, note, text in BLOCKS if note.startswith("in place of")]
    old = SIMPLE.read_text()
    (line,) = re.findall(r"^    weights = .*\n", old, re.MULTILINE)
    (tmp_path / "gaussian.py").write_text(old.replace(line, lines))
    spec = importlib.util.spec_from_file_location("gaussian", tmp_path / "gaussian.py")
    gaussian = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gaussian)
    values = np.random.default_rng(1).random((1, 50, 60))
    expected = ndimage.gaussian_filter(values[0], 14 / 4, radius=7, mode="constant")
    gaussian.average(values, 15, axis=1)
    gaussian.average(values, 15, axis=2)
    inside = np.s_[7:-7, 7:-7]
    np.testing.assert_allclose(values[0][inside], expected[inside], rtol=1e-9)


def test_pictures_can_be_drawn_again(tmp_path):
    script = ROOT / "tests/pictures/make_pictures.py"
    subprocess.run([sys.executable, script, tmp_path], check=True)
    kept = {picture.name for picture in script.parent.glob("*.png")}
    assert {picture.name for picture in tmp_path.iterdir()} == kept
    assert all(f"tests/pictures/{name}" in README for name in kept)


def test_page_is_short_and_its_links_work():
    assert len(README.split()) <= 2300
    assert max(map(len, README.splitlines())) <= 100
    assert README.count("\n") <= 300
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    for link in re.findall(r"\]\(([^)]+)\)", README):
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("http"):
            assert (ROOT / link).exists(), link
