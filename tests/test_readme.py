"""README's commands are run in the order shown, and what it quotes is compared."""

import importlib.util
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import rasterio
from rasterio.transform import rowcol
from scipy import ndimage
from tools import ROOT, SIMPLE, copy_tracked

README = (ROOT / "README.md").read_text()
BLOCK = re.compile(
    r"(?:<!-- (.*?) -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
BLOCKS = [match.groups("") for match in BLOCK.finditer(README)]


def blank(text):
    """Take out of a text what differs from run to run: seconds, job numbers, bytes."""
    text = re.sub(r"\d+\.\d seconds", "N seconds", text)
    text = re.sub(r"(batch job |StepId=|JOB |job_(?:out|err)_)\d+", r"\1N", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:]+|\(\d+ >|\bc\d\b", "N", text)
    return text.strip().splitlines()


def wait_for_jobs(output, environment):
    """Wait until the job that a command has submitted has ended, with all its tasks."""
    for job in re.findall(r"Submitted batch job (\d+)", output):
        squeue = ["squeue", "--noheader", "--jobs", job]
        latest = time.monotonic() + 120
        while subprocess.run(
            squeue, env=environment, capture_output=True, check=False
        ).stdout:
            assert time.monotonic() < latest, f"job {job} does not end"
            time.sleep(0.05)


def read(path):
    """Return the first band of a raster, with its place."""
    with rasterio.open(path) as raster:
        return raster.read(1), raster.transform


def test_commands_in_their_order(cluster, tmp_path):
    checkout = copy_tracked(tmp_path / "checkout")
    path = f"{checkout}/.venv/bin:{os.environ['PATH']}"  # as after activate
    environment = cluster | {"PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    output = mosaic = None
    for note, language, text in BLOCKS:
        if language == "bash" and not note.startswith("not run"):
            done = subprocess.run(
                ["bash", "-c", text],
                cwd=checkout,
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            output = done.stdout
            assert done.returncode == 0, (text, done)
            wait_for_jobs(output, environment)
            for log in checkout.glob("array_job_err_*.txt"):
                assert log.read_text() == "", text
        elif language == "text" and note.startswith("in any order"):
            assert set(blank(text)) <= set(blank(output))
        elif language == "text":
            assert blank(output) == blank(text)
        if "batch_job_multiprocessing.sh all.vrt" in text:
            mosaic, place = read(checkout / "smooth/all.tif")
            assert np.isfinite(mosaic[7:-7, 7:-7]).all()
        if "together.vrt" in text:  # it reaches over the mosaic's edges
            together, wider = read(checkout / "together.vrt")
            row, column = rowcol(wider, place.c, place.f, op=round)
            height, width = mosaic.shape
            together = together[row : row + height, column : column + width]
            assert together.tobytes() == mosaic.tobytes()
    north, _ = read(checkout / "smooth/north.tif")
    south, _ = read(checkout / "smooth/south.tif")
    assert north[7:172, 7:-7].tobytes() == mosaic[7:172, 7:-7].tobytes()
    assert south[7:172, 7:-7].tobytes() == mosaic[172:337, 7:-7].tobytes()


@pytest.mark.parametrize(
    ("note", "text"), [(note, text) for note, _, text in BLOCKS if note[:5] == "from "]
)
def test_excerpts_are_in_their_files(note, text):
    assert text in (ROOT / note.removeprefix("from ")).read_text()


def test_other_kernel_is_a_gaussian(tmp_path):
    (lines,) = [text for note, _, text in BLOCKS if note.startswith("in place of")]
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


def test_links_within_the_page_work():
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) > 10
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("http"):
            assert (ROOT / link).exists(), link
