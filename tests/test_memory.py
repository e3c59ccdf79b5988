"""What README says of memory holds for the processes of a script together."""

import math
import os
import subprocess
import sys

import pytest
import rasterio
from benchmark import peak_memory
from tools import MULTI, ROOT, SIMPLE

PROCESSES = 2
SLOW = """
import os, time, rasterio.io
def log(word, row):
    os.write(notes, f"{word} {row}\\n".encode())
def write(self, values, window):
    time.sleep(0.2)
    fast_write(self, values, window=window)
    log("written", window[0][1])
def read(self, *arguments, window, **options):
    rows, columns = window
    log("read", rows[0])
    return fast_read(self, *arguments, window=window, **options)
notes = os.open("notes.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
fast_write, rasterio.io.DatasetWriter.write = rasterio.io.DatasetWriter.write, write
fast_read, rasterio.io.DatasetReader.read = rasterio.io.DatasetReader.read, read
"""


def sparse_raster(path, width, height, bands=1, dtype="float32", **profile):
    """Make a GeoTIFF without its blocks, which GDAL reads as nodata; return its path."""
    profile |= {"width": width, "height": height, "count": bands, "dtype": dtype}
    profile |= {"transform": rasterio.Affine.scale(2), "nodata": -9999}
    with rasterio.open(path, "w", "GTiff", SPARSE_OK=True, **profile):
        return path


def peak_of(script, raster, window, **environment):
    """Run a script in the raster's folder; return the most MB that it took."""
    command = [sys.executable, script, raster, str(window)]
    environment |= {"SLURM_CPUS_PER_TASK": str(PROCESSES)}
    return peak_memory(command, os.environ | environment, cwd=raster.parent)


def promised(width, window, bands=1, block_rows=1):
    """Return the MB that README gives for float32."""
    row = width * bands * 4 / 1e6
    chunk = max(8, window * row)
    if block_rows * row <= 64:
        chunk = math.ceil(chunk / row / block_rows) * block_rows * row
    return 100 + PROCESSES * (40 + 3 * chunk + 2 * window * row)


@pytest.mark.parametrize(
    ("width", "height", "bands", "window", "tile"),
    [
        (12000, 3000, 1, 15, 1),
        (3000, 3000, 12, 51, 1),
        (300000, 150, 1, 15, 1),
        (12000, 3000, 1, 15, 512),
        (6000, 3000, 1, 513, 512),
    ],
)
def test_multiprocessing_takes_what_readme_says(
    tmp_path, width, height, bands, window, tile
):
    tiles = {"tiled": True, "blockxsize": tile, "blockysize": tile} if tile > 1 else {}
    raster = sparse_raster(tmp_path / "a.tif", width, height, bands, **tiles)
    most = promised(width, window, bands, tile)
    assert most / 1.4 < peak_of(MULTI, raster, window) <= most


def test_multiprocessing_takes_no_more_for_a_higher_raster(tmp_path):
    low, high = [
        peak_of(MULTI, sparse_raster(tmp_path / f"{height}.tif", 12000, height), 15)
        for height in (3000, 12000)
    ]
    assert high == pytest.approx(low, rel=0.1)


def test_workers_wait_for_a_slow_disk(tmp_path):
    width, window = 12000, 15
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    raster = sparse_raster(tmp_path / "a.tif", width, 3000)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    peak = peak_of(MULTI, raster, window, PYTHONPATH=path)
    assert peak <= promised(width, window)
    ring = 2 * PROCESSES * 8e6 / (width * 4)  # rows in its slots
    written = ahead = 0
    for line in (tmp_path / "notes.txt").read_text().splitlines():
        word, row = line.split()
        if word == "written":
            written = int(row)
        else:
            ahead = max(ahead, int(row) - written)
    assert written == 3000
    assert ring / 2 < ahead <= ring + window


def test_python_alone_takes_more_than_1_mb(tmp_path):
    command = [sys.executable, "-c", "import rasterio, scipy.ndimage"]
    assert 50 < peak_memory(command, os.environ) < 100


@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_simple_takes_what_readme_says(tmp_path, dtype):
    raster = sparse_raster(tmp_path / "a.tif", 4000, 4000, dtype=dtype)
    assert 4000 * 4000 * 4 / 1e6 < peak_of(SIMPLE, raster, 15) <= 100 + 1.6 * 64


def test_benchmark_prints_a_table_with_every_row(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "benchmark.py", "--quick"],
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in done.stdout.splitlines()
        if line.startswith("|")
    ]
    names = {(row[0].split()[0], row[1].split()[0]) for row in rows if len(row) == 9}
    assert names >= {
        *((f"{name}.tif", "copy") for name in ("plain", "tiled", "sheet", "huge")),
        *(("plain.tif", name) for name in ("simple", "multiprocessing", "2-D")),
        *(("tiled.tif", name) for name in ("simple", "multiprocessing")),
        *(("sheet.tif", name) for name in ("simple", "2-D")),
        ("huge.tif", "multiprocessing"),
    }
    assert rows[-1][0] == "15"  # the workers' and the writer's time
    assert not list(tmp_path.iterdir())  # the rasters are gone
