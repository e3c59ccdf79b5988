"""Special and random values: the reference's result, and the same of both scripts.

More random cases than in a usual run: CASES=5000 pytest tests/test_values.py
"""

import os

import numpy as np
import pytest
from rasters import brute_force, read, write_raster


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_special_values_spoil_no_other_pixels(tmp_path, blurred, dtype):
    """They change the windows that they touch as IEEE says, and no others."""
    limits = np.finfo(dtype)
    values = np.random.default_rng(0).random((1, 120, 120)).astype(dtype)
    values[:, 90:] = limits.smallest_subnormal * np.arange(1, 121, dtype=dtype)
    special = values.copy()
    kinds = [np.nan, np.inf, -np.inf, limits.max, limits.min, np.inf]
    kinds += [limits.smallest_subnormal, -limits.tiny, -0.0]
    special[0, 10:71:30, 10:71:30] = np.reshape(kinds, (3, 3))
    special[0, 42, 72] = -np.inf  # beside the other infinity
    special[0, 61, 61], special[0, 99, 99] = limits.eps, np.inf
    usual = write_raster(tmp_path / "usual.tif", values)
    raster = write_raster(tmp_path / "special.tif", special)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        expected = brute_force(special, True, 5)
    touched = brute_force(values != special, True, 5) != 0
    before, result = read(blurred(usual)), read(blurred(raster))
    assert result.dtype == dtype
    tiny = 5 * limits.smallest_subnormal
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=tiny)
    assert np.array_equal(result[~touched], before[~touched])


def make_case(seed, path):
    """Write a random raster; return its values, which are valid, and how to blur it."""
    rng = np.random.default_rng(seed)
    kinds = "u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8", "i8", "u8"
    dtype = np.dtype(rng.choice(kinds))
    bands, height, width = map(int, rng.integers(1, [7, 90, 90]))
    values = rng.normal(0, 10.0 ** rng.integers(0, 4), (bands, height, width))
    limits = np.finfo(np.float32) if dtype.kind == "f" else np.iinfo(dtype)
    low, high = max(limits.min, -1e9), min(limits.max, 10**9)
    values = np.clip(values, low, high).astype(dtype)
    holes = rng.random(values.shape) < 0.002
    profile = {"compress": str(rng.choice(["none", "deflate", "lzw", "zstd"]))}
    profile["photometric"] = "minisblack"  # else GDAL takes band 4 for alpha
    profile["interleave"] = str(rng.choice(["pixel", "band"]))
    if rng.random() < 0.5:
        side = int(rng.choice([16, 32, 64]))
        profile |= {"tiled": True, "blockxsize": side, "blockysize": side}
    else:
        profile["blockysize"] = int(rng.integers(1, height + 1))
    kind, written = ["none", "nodata", "mask", "alpha", "nan"][seed % 5], values
    if kind == "nan" and dtype.kind == "f":
        values[holes] = np.nan
    elif kind == "nodata":
        profile["nodata"] = int(rng.choice([0, 1, 99]))
        holes = values == profile["nodata"]
    elif kind in ("mask", "alpha"):
        holes[:] = holes.any(axis=0)
        if kind == "mask":
            profile |= {"mask": ~holes[0], "inside": seed % 2 == 0}
        else:
            alpha = np.where(holes[:1], 0, high).astype(dtype)
            written, profile["alpha"] = np.concatenate([values, alpha]), True
    else:
        holes[:] = False
    write_raster(path, written, **profile)
    changes = {  # so that pieces have few rows, read few at a time, from a full cache
        "max(2 * window, ": f"max({rng.integers(1, 30)}, ",
        "piece_bytes = 1.6e7 * min": f"piece_bytes = {width * rng.integers(1, 200)} * min",
        "int(1.6e7 + min(": f"int({rng.choice([100_000, 1_000_000])} + 0 * min(",
    }
    window = int(rng.choice([1, 3, 3, 5, 5, 7, 7, 15, 31, 71]))
    environment = {"SLURM_CPUS_PER_TASK": str(rng.integers(1, 5))}
    environment["GDAL_TIFF_ENDIANNESS"] = "BIG"  # pixels are not written by GDAL
    return values, ~holes, window, {"changes": changes, **environment}


def test_no_random_raster_gets_a_wrong_mean(tmp_path, blurred):
    """Both scripts give the reference's result, and the same one bit for bit."""
    for seed in range(int(os.environ.get("CASES", "40"))):
        raster = tmp_path / f"{seed}.tif"
        values, valid, window, settings = make_case(seed, raster)
        result = read(blurred(raster, window, **settings))
        assert result.dtype == np.result_type(np.float32, values.dtype), seed
        tolerance = 1e-6 * np.abs(values[valid], dtype=np.float64).max(initial=0)
        expected, text = brute_force(values, valid, window), f"seed {seed}: {settings}"
        np.testing.assert_allclose(result, expected, 0, tolerance, err_msg=text)
