"""What a run costs is counted: the bytes that it reads, and how time grows with bands."""

import subprocess

import numpy as np
import pytest
import rasterio
from benchmark import tiles
from rasters import stack_files, write_raster
from runs import MULTI, SIMPLE, check_silent, need

RNG = np.random.default_rng(0)
STRIP = {"blockysize": 5000, "compress": "lzw"}
MASK = {"mask": RNG.random((5000, 5000)) > 0.5, "inside": True}
MANY_PIECES = {"piece_bytes = 1.6e7": "piece_bytes = 1e6"}
CASES = {  # bands, rows, columns, the profile of the file; how it is read
    "bands in pixels": ((12, 4000, 1500), tiles(512, interleave="pixel"), ""),
    "bands in tiles": ((12, 1500, 1500), tiles(512, interleave="band"), ""),
    "bands in lines": ((12, 1500, 1500), {"driver": "ENVI", "INTERLEAVE": "BIL"}, ""),
    "130 bands": ((130, 500, 500), tiles(256, interleave="pixel"), ""),
    "tiles of 4096": ((1, 5000, 5000), tiles(4096, **MASK), ""),
    "virtual, tiles of 2048": ((1, 2500, 9000), tiles(2048), "vrt"),
    "virtual, one strip": ((1, 5000, 5000), STRIP, "vrt"),
    "virtual in virtual": ((1, 2500, 9000), tiles(2048), "vrt of vrt"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_byte_is_read_once(case, tmp_path, run_fast):
    """But for halos and the head: at most 1.3 times the file. With 2 CPUs, at most 2.3."""
    shape, profile, kind = CASES[case]
    raster = tmp_path / "a.tif"
    write_raster(raster, RNG.integers(0, 255, shape, np.uint8), **profile)
    size = raster.stat().st_size
    for number in range(kind.count("vrt")):
        raster = stack_files(tmp_path / f"{number}.vrt", raster)
    for script, most in (SIMPLE, 1.3), (MULTI, 2.3):
        done = run_fast(script, raster, 15, cwd=tmp_path, changes=MANY_PIECES)
        check_silent(done)
        print(f"{case}, {script.name}: {done.bytes_read / size:.2f}")
        assert size < done.bytes_read < most * size


def test_time_does_not_grow_with_the_square_of_the_bands(tmp_path, run_fast):
    """2400 bands take at most 12 times the processor seconds of 300."""
    seconds = []
    for count in 300, 2400:
        raster = tmp_path / f"{count}.tif"
        write_raster(raster, RNG.integers(0, 255, (count, 60, 60), np.uint8))
        runs = [run_fast(SIMPLE, raster, 5, cwd=tmp_path) for _ in range(3)]
        seconds.append(min(done.seconds for done in runs))
    assert seconds[1] < 12 * seconds[0], seconds


def test_sheets_of_a_virtual_raster_stay_open(tmp_path, run_fast):
    """120 side by side, more than GDAL keeps open by itself."""
    parts = RNG.integers(0, 255, (120, 1, 600, 50), np.uint8)
    paths = [tmp_path / f"{number}.tif" for number in range(len(parts))]
    for number, path in enumerate(paths):
        place = rasterio.Affine(2, 0, 100 * number, 0, -2, 0)
        profile = {"compress": "deflate", "blockysize": 600, "transform": place}
        write_raster(path, parts[number], **profile)
    need("gdalbuildvrt")
    subprocess.run(["gdalbuildvrt", "-q", tmp_path / "all.vrt", *paths], check=True)
    done = run_fast(SIMPLE, tmp_path / "all.vrt", 5, cwd=tmp_path, changes=MANY_PIECES)
    check_silent(done)
    assert done.bytes_read < 2 * parts.size
