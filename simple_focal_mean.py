"""Blur a raster: each pixel becomes the mean of the square window around it.

    python simple_focal_mean.py RASTER [WINDOW]

RASTER is what GDAL opens, WINDOW an odd number of pixels (15). smooth/NAME.tif, the
result, is NaN if a pixel of the window is invalid or outside, as with terra's focal.
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import warnings
from itertools import product
from pathlib import Path
from time import monotonic

import numpy as np
import rasterio
from scipy.ndimage import convolve1d

os.environ["GDAL_CACHEMAX"] = "12"  # MB; GDAL would take 5 % of the node's memory


def main(path, window):
    """Blur the raster at path, all of it in memory, and print where the result is."""
    began = monotonic()
    target = Path("smooth", Path(path).stem + ".tif")
    with rasterio.open(path) as raster:
        bands, dtype = choose_bands(raster, window)
        values = np.empty((len(bands), *raster.shape), dtype)
        read_rows(raster, bands, 0, values)
        average(values, window, axis=1)
        average(values, window, axis=2)
        with new_result(target, raster, bands, dtype) as result:
            result.write(values)
    size = f"{raster.width} x {raster.height} pixels, window {window} x {window}"
    print(f"{target}: {size}, {monotonic() - began:.1f} seconds")


def choose_bands(raster, window):
    """Return the bands, all but alpha, and the result's type; ValueError if none."""
    bands = [i for i in raster.indexes if raster.colorinterp[i - 1].name != "alpha"]
    dtype = np.result_type(np.float32, *[raster.dtypes[band - 1] for band in bands])
    if not bands or dtype.kind == "c":
        raise ValueError(f"no band of real numbers, but maybe in {raster.subdatasets}")
    if window > min(raster.shape):
        print(f"{raster.name}: warning: smaller than the window", file=sys.stderr)
    return bands, dtype


def read_rows(raster, bands, top, values):
    """Fill values (band, row, column) with rows from top on, NaN where not valid."""
    # GDAL reads a part again for its mask: few blocks, which are in its cache then.
    tall, wide = np.maximum(raster.block_shapes[0], (64, 512))
    for y in range(0, values.shape[1], tall):
        for x in range(0, raster.width, wide):
            part = values[:, y : y + tall, x : x + wide]
            place = rasterio.windows.Window(x, top + y, part.shape[2], part.shape[1])
            raster.read(bands, window=place, out=part)
            part[raster.read_masks(bands, window=place) == 0] = np.nan


def average(values, window, axis):
    """Replace values (band, row, column) by means of window pixels along an axis."""
    # Two lines make a square. Pixels beyond the edge are NaN: so is a mean with one.
    weights = np.full(window, 1 / window)  # or any separable kernel, in both scripts
    convolve1d(values, weights, axis, output=values, mode="constant", cval=np.nan)


@contextlib.contextmanager
def new_result(target, raster, bands, dtype):
    """Yield a dataset to write, named target once it is whole; OSError if it is not."""
    if target.resolve() in [Path(name).resolve() for name in raster.files]:
        raise ValueError(f"its result {target} would overwrite it: move it elsewhere")
    target.parent.mkdir(exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and Slurm's end
        signal.signal(number, signal.default_int_handler)
    profile = raster.meta | {"driver": "GTiff", "count": len(bands), "dtype": dtype}
    profile |= {"nodata": np.nan, "interleave": "band", "blockysize": 16}
    profile |= {"gcps": raster.gcps[0], "crs": raster.crs or raster.gcps[1]}
    with tempfile.TemporaryDirectory(".unfinished", target.name, "smooth") as folder:
        draft = Path(folder, target.name)
        try:
            with rasterio.open(draft, "w", rpcs=raster.rpcs, **profile) as result:
                result.update_tags(**raster.tags())
                for item in ("descriptions", "scales", "offsets", "units"):
                    setattr(result, item, [getattr(raster, item)[b - 1] for b in bands])
                yield result
            # GDAL reports no error if the disk fills while it closes a file.
            with rasterio.open(draft) as file:
                for b, ((y, _), _) in product(file.indexes, file.block_windows()):
                    begin = file.get_tag_item(f"BLOCK_OFFSET_0_{y}", "TIFF", b) or 0
                    if int(begin) + file.block_size(b, y, 0) > draft.stat().st_size:
                        raise rasterio.errors.RasterioIOError("a block is not whole")
        except rasterio.errors.RasterioError as error:
            raise OSError(f"cannot write it, is the disk full? {error}") from None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the rest takes no time
        for ending in (".aux.xml", ".ovr", ".msk"):  # of an earlier result
            Path(f"{target}{ending}").unlink(missing_ok=True)
        draft.replace(target)


if __name__ == "__main__":
    warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends scipy's loops, too
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("raster")
    parser.add_argument("window", type=int, nargs="?", default=15)
    options = parser.parse_args()
    if options.window < 1 or options.window % 2 == 0:
        parser.error("WINDOW must be an odd number of pixels")
    try:
        main(options.raster, options.window)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
        reason = str(error.__cause__ or error) or "stopped, no result"
        sys.exit(f"{options.raster}: {' '.join(reason.split())}")
