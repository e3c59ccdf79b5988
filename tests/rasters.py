"""Rasters for the tests: writing and reading them, and their mean by brute force."""

import subprocess

import numpy as np
import rasterio
from rasterio.enums import ColorInterp
from rasterio.shutil import copy
from runs import need
from scipy.io import netcdf_file


def read(path):
    """Return the values (band, row, column) of a raster."""
    with rasterio.open(path) as raster:
        return raster.read()


def write_raster(path, bands, mask=None, inside=False, tags=(), alpha=False, **profile):
    """Write an array (band, row, column) as a GeoTIFF in Finnish coordinates; return its path.

    mask (row, column), inside or beside the file, is true for valid pixels.
    """
    place = {"crs": "EPSG:3067", "transform": rasterio.Affine(2, 0, 5e5, 0, -2, 7e6)}
    kind = dict(zip(["count", "height", "width"], bands.shape)) | {"dtype": bands.dtype}
    profile = {"driver": "GTiff"} | place | kind | profile
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=inside),
        rasterio.open(path, "w", **profile) as raster,
    ):
        raster.update_tags(**dict(tags))
        if alpha:
            others = [ColorInterp.undefined] * (len(bands) - 1)
            raster.colorinterp = [*others, ColorInterp.alpha]
        raster.write(bands)
        if mask is not None:
            raster.write_mask(mask)
    return path


def write_earlier(target, raster):
    """Write what is known as an earlier result of a raster; return its bytes."""
    tags = {"FOCAL_MEAN_OF": raster, "FOCAL_MEAN_WINDOW": "9 x 9"}
    write_raster(target, np.ones((1, 9, 9)), tags=tags)
    return target.read_bytes()


def write_netcdf(path, shape=(40, 50), names=("red", "nir")):
    """Write a classic netCDF; return its path."""
    with netcdf_file(path, "w") as file:
        file.createDimension("y", shape[0])
        file.createDimension("x", shape[1])
        for number, name in enumerate(names):
            variable = file.createVariable(name, "f", ("y", "x"))
            variable[:] = np.arange(np.prod(shape)).reshape(shape) % 997 + number
    return path


def stack_files(path, *files):
    """Write a virtual raster with the first band of each file as a band; return its path."""
    need("gdalbuildvrt")
    subprocess.run(["gdalbuildvrt", "-q", "-separate", path, *files], check=True)
    return path


def write_vrt(path, source, changes=None):
    """Write a virtual raster of a raster, with changes of its text; return its path."""
    copy(source, path, driver="VRT")
    text = path.read_text()
    for old, new in (changes or {}).items():
        assert old in text, text
        text = text.replace(old, new)
    path.write_text(text)
    return path


def write_zeros(path, width, height, bands=1, **profile):
    """Write a GeoTIFF of zeros without a block, or with all where it is compressed."""
    usual = {"dtype": "float32", "nodata": -9999, "transform": rasterio.Affine.scale(2)}
    profile = usual | profile | {"width": width, "height": height, "count": bands}
    sparse = "compress" not in profile
    with rasterio.open(path, "w", "GTiff", SPARSE_OK=sparse, **profile):
        return path


def brute_force(bands, valid, window):
    """Return the focal mean in float64, each window summed by itself; NaN where it is nodata."""
    half = window // 2
    values = np.where(valid, np.asarray(bands, np.float64), np.nan)
    padded = np.pad(
        values, [(0, 0), (half, half), (half, half)], constant_values=np.nan
    )
    windows = np.lib.stride_tricks.sliding_window_view(padded, (window, window), (1, 2))
    return windows.mean(axis=(3, 4))
