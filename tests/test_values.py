"""Special and random values: the reference's result, and the same of both scripts.

More random cases than in a usual run: CASES=5000 pytest tests/test_values.py
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import rasterio
from tools import SCRIPTS, brute_force, check_silent, read, write_raster


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_special_values_spoil_no_other_pixels(tmp_path, run_both, dtype):
    """They change the windows that they touch as IEEE says, and no others."""
    limits = np.finfo(dtype)
    values = np.random.default_rng(0).random((1, 120, 120)).astype(dtype)
    values[:, 90:] = limits.smallest_subnormal * np.arange(1, 121, dtype=dtype)
    special = values.copy()
    for place, value in {
        (10, 10): np.nan,
        (10, 40): np.inf,
        (10, 70): -np.inf,
        (40, 10): limits.max,
        (40, 40): limits.min,
        (40, 70): np.inf,
        (42, 72): -np.inf,
        (70, 10): limits.smallest_subnormal,
        (70, 40): -limits.tiny,
        (70, 70): -0.0,
        (61, 61): limits.eps,
        (99, 99): np.inf,
    }.items():
        special[0][place] = value
    usual = write_raster(tmp_path / "usual.tif", values)
    raster = write_raster(tmp_path / "special.tif", special)
    everywhere = np.ones(special.shape, bool)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        expected = brute_force(special, everywhere, 5)
    touched = brute_force(values != special, everywhere, 5) != 0
    results = []
    for _, done in run_both(usual, 5):
        check_silent(done)
    for cwd, done in run_both(raster, 5):
        check_silent(done)
        result = read(cwd / "smooth" / "special.tif")
        assert result.dtype == dtype
        tiny = 5 * limits.smallest_subnormal
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=tiny)
        before = read(cwd / "smooth" / "usual.tif")
        assert np.array_equal(result[~touched], before[~touched])
        results.append(result.tobytes())
    assert results[0] == results[1]


def make_case(seed, path):
    """Write a random raster; return its values, which are valid, and how to blur it."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(rng.choice(["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8", "i8"]))
    bands, height, width = rng.integers(1, [7, 70, 70])
    values = rng.normal(0, 10.0 ** rng.integers(0, 4), (bands, height, width))
    low, high = (-1e9, 1e9) if dtype.kind == "f" else (0, np.iinfo(dtype).max)
    values = np.clip(values, low, high).astype(dtype)
    holes = rng.random(values.shape) < 0.002
    kind = rng.choice(["none", "nodata", "mask", "alpha", "nan"])
    profile = {"compress": str(rng.choice(["none", "deflate", "lzw", "zstd"]))}
    profile["photometric"] = "minisblack"  # else GDAL takes band 4 for alpha
    profile["transform"] = rasterio.Affine(2, 0, 0, 0, -2, 0)
    profile["interleave"] = str(rng.choice(["pixel", "band"]))
    if rng.random() < 0.5:
        side = int(rng.choice([16, 32, 64]))
        profile |= {"tiled": True, "blockxsize": side, "blockysize": side}
    else:
        profile["blockysize"] = int(rng.integers(1, height + 1))
    if kind == "nan" and dtype.kind == "f":
        values[holes] = np.nan
    elif kind in ("mask", "alpha"):
        holes[:] = holes.any(axis=0)
    elif kind == "nodata":
        profile["nodata"] = int(rng.choice([0, 1, 99]))
        holes = values == profile["nodata"]
    else:
        holes[:] = False
    shape = {"count": int(bands), "height": int(height), "width": int(width)}
    shape["count"] += kind == "alpha"
    profile |= {"driver": "GTiff", "dtype": dtype, **shape}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", **profile) as file,
    ):
        if kind == "alpha":
            colors = [rasterio.enums.ColorInterp.undefined] * bands
            file.colorinterp = [*colors, rasterio.enums.ColorInterp.alpha]
            file.write(np.where(holes[0], 0, high).astype(dtype), int(bands) + 1)
        file.write(values, list(range(1, bands + 1)))
        if kind == "mask":
            file.write_mask(~holes[0])
    tall, wide = rng.integers(1, 90, 2)
    changes = {
        "(512 / wide)": f"({wide} / wide)",
        "min(64,": f"min({tall},",
    }  # of a part
    if rng.random() < 0.3:  # then strips of columns, too
        changes["\nCACHE = "] = f"\nCACHE = {rng.integers(1, 9999)} or "
    if rng.random() < 0.7:  # so many rows in a piece
        row = int(width * bands * np.result_type(dtype, np.float32).itemsize)
        chunk = row * int(rng.integers(1, 30))
        changes["\nPIECE = "] = f"\nPIECE = {chunk} or "
    window = int(rng.choice([1, 3, 5, 7, 15, 71], p=[0.1, 0.3, 0.2, 0.2, 0.15, 0.05]))
    environment = {"SLURM_CPUS_PER_TASK": str(rng.integers(1, 5))}
    return values, ~holes, window, {"changes": changes, **environment}


def test_no_random_raster_gets_a_wrong_mean(tmp_path, run_fast):
    """Both scripts give the reference's result, and the same one bit for bit."""
    seeds = range(int(os.environ.get("CASES", "40")))
    cases = [make_case(seed, tmp_path / f"{seed}.tif") for seed in seeds]

    def blur_all(script):
        cwd = tmp_path / script.stem
        cwd.mkdir()
        for seed, (_, _, window, settings) in zip(seeds, cases):
            raster = tmp_path / f"{seed}.tif"
            done = run_fast(script, raster, window, cwd=cwd, **settings)
            assert done.returncode == 0, (seed, done)

    with ThreadPoolExecutor() as threads:
        list(threads.map(blur_all, SCRIPTS))
    for seed, (values, valid, window, settings) in zip(seeds, cases):
        expected = brute_force(values, valid, window)
        simple, multi = (
            read(tmp_path / script.stem / "smooth" / f"{seed}.tif")
            for script in SCRIPTS
        )
        assert simple.dtype == np.result_type(np.float32, values.dtype), seed
        tolerance = 1e-6 * np.abs(values[valid], dtype=np.float64).max(initial=0)
        np.testing.assert_allclose(
            simple,
            expected,
            rtol=0,
            atol=tolerance,
            err_msg=f"seed {seed}: {window} {settings}",
        )
        assert simple.tobytes() == multi.tobytes(), seed
