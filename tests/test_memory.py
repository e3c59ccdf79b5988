"""The memory that a run takes is what the page and the warnings say, as Slurm counts it."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from benchmark import RASTERS, peak_memory
from tools import MULTI, ROOT, SIMPLE, write_zeros

MB = 1.048576  # a MB for Slurm, which counts 2^20 bytes, in 10^6 bytes
TILES = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate"}


def peak_of(script, raster, window, cpus=1, **environment):
    """Run a script in the raster's folder; return the most MB, as RSS and as PSS."""
    command = [sys.executable, script, raster, str(window)]
    environment |= {"SLURM_CPUS_PER_TASK": str(cpus)}
    return peak_memory(command, os.environ | environment, cwd=raster.parent)


@pytest.mark.parametrize(
    ("cpus", "window", "height", "profile"),
    [
        *((cpus, window, 3000, {}) for cpus in (1, 2) for window in (15, 51)),
        (16, 51, 6000, {}),
        *((cpus, 51, 3072, TILES) for cpus in (1, 2, 8)),
    ],
)
def test_no_job_takes_more_than_300_mb_for_each_cpu(
    tmp_path, cpus, window, height, profile
):
    raster = write_zeros(tmp_path / "a.tif", 12000, height, **profile)
    as_rss, as_pss = peak_of(MULTI, raster, window, cpus)
    assert 80 * cpus < as_rss < 300 * cpus * MB
    assert as_pss < 400 * MB or cpus != 2


@pytest.mark.parametrize(("window", "asked"), [(41, 300), (167, 300 + 4 * 24)])
def test_windows_of_8_and_32_mb_take_no_more_than_asked_for(tmp_path, window, asked):
    raster = write_zeros(tmp_path / "a.tif", 48000, 400)
    assert asked / 2 < peak_of(MULTI, raster, window)[0] < asked * MB


def test_many_bands_take_no_more_than_300_mb_for_each_cpu(tmp_path):
    raster = write_zeros(tmp_path / "a.tif", 3000, 1500, bands=12)
    assert peak_of(MULTI, raster, 51, cpus=2)[0] < 600


def test_a_higher_raster_needs_no_more_memory(tmp_path):
    low, high = [
        peak_of(MULTI, write_zeros(tmp_path / f"{rows}.tif", 12000, rows), 15, cpus=2)
        for rows in (2000, 8000)
    ]
    np.testing.assert_allclose(high, low, rtol=0.15)


def test_python_alone_takes_more_than_1_mb():
    command = [sys.executable, "-c", "import rasterio, scipy.ndimage"]
    assert 30 < peak_memory(command, os.environ)[0] < 150


def test_benchmark_has_the_rows_of_its_page(tmp_path):
    names = {"tiled.tif", "classic.nc", "picture.png", "stack.tif", "width_8204.tif"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "benchmark.py", "--quick", *names],
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(tmp_path.iterdir())  # the rasters are gone
    pages = done.stdout, (ROOT / "tests" / "benchmark.md").read_text()
    rows = r"(?m)^\| (\w+\.\w+) .*? \| (\S+ ?\d*) \| 15 \| .* MB \|$"
    printed, kept = [set(re.findall(rows, page)) for page in pages]
    assert printed == {(raster, program) for raster, program in kept if raster in names}
    assert {raster for raster, program in kept} == set(RASTERS)
    assert len(printed) == 8 + 3 * 3 + 2


ONE_STRIP = {"blockysize": 6000, "compress": "lzw", "dtype": "int16"}
TILES_4096 = {**TILES, "blockxsize": 4096, "blockysize": 4096}
STACK = {**TILES, "dtype": "int16", "interleave": "pixel"}


@pytest.mark.parametrize("script", [SIMPLE, MULTI])
@pytest.mark.parametrize(
    ("columns", "rows", "bands", "window", "profile"),
    [
        (12000, 6000, 1, 15, {}),
        (6000, 2000, 1, 501, TILES),
        (12288, 8192, 1, 15, TILES_4096),
        (8000, 6000, 1, 15, ONE_STRIP),
        (10980, 1024, 12, 15, STACK),
        (300000, 300, 1, 15, {}),
        (300000, 30, 1, 501, {}),
        (3000, 2500, 1, 2001, {}),
        (6000, 4000, 1, 15, {"dtype": "float64"}),
    ],
)
def test_too_small_a_job_is_told_what_to_ask_for(
    tmp_path, script, columns, rows, bands, window, profile
):
    """Never too little, and at most 1.3 times what the run takes."""
    raster = write_zeros(tmp_path / "a.tif", columns, rows, bands, **profile)
    small = {"SLURM_MEM_PER_CPU": "1", "SLURM_CPUS_ON_NODE": "2"}
    command = [sys.executable, script, raster, str(window)]
    environment = os.environ | small | {"SLURM_CPUS_PER_TASK": "2"}
    with open(tmp_path / "err.txt", "w") as errors:
        taken = peak_memory(command, environment, cwd=tmp_path, stderr=errors)[0] / MB
    line = (tmp_path / "err.txt").read_text().splitlines()[-1]
    needed, of_cpu = re.search(
        r"needs some (\d+) MB.* --mem-per-cpu=(\d+)", line
    ).groups()
    print(
        f"told {script.stem[:5]} {columns} {bands} {window} {needed} MB, taken {taken:.0f} MB"
    )
    assert 2 * int(of_cpu) >= int(needed)
    assert taken <= int(needed) <= 1.3 * taken
