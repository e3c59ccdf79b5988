"""Blur a georeferenced raster: each pixel becomes the mean of the window around it.

    python simple_focal_mean.py RASTER [WINDOW]

RASTER  a raster that GDAL opens: a GeoTIFF, a virtual raster (.vrt), ...
WINDOW  side of the square window in pixels, an odd number; 15 unless given

The result is smooth/NAME.tif in the current folder, in floating point. A pixel whose
window reaches over the raster's edge, or touches a pixel that is not valid, becomes
nodata (NaN). One process works on the whole raster in memory.
"""

import contextlib
import os
import signal
import sys
import tempfile
import time
import warnings

import numpy as np
import rasterio
from rasterio.enums import ColorInterp
from scipy.ndimage import convolve1d

PIECE = 2e6  # bytes read at once, few enough to be in GDAL's cache for their mask
# GDAL's cache of blocks, in MB: it would take 5 % of the node's memory, not the job's.
os.environ["GDAL_CACHEMAX"] = "16"
warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)


def parse_arguments(arguments):
    """Return the raster's path and the window in pixels.

    Prints the usage and exits where it is asked for (0) or the arguments are wrong (2).
    """
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        sys.exit(0)
    path, window, *_ = [*arguments, "15", ""]
    if len(arguments) not in (1, 2):
        problem = f"{len(arguments)} arguments given, but it takes RASTER and WINDOW"
    elif not window.isdecimal() or len(window) > 5 or int(window) % 2 == 0:
        problem = f"WINDOW must be an odd number of pixels, to 99999, not {window}"
    else:
        return path, int(window)
    print(__doc__, problem, sep="\n", file=sys.stderr)
    sys.exit(2)


def find_bands(raster, window):
    """Return the numbers of the bands to blur, all but alpha, and the result's type.

    The type is float32, or float64 where float32 cannot hold the values. Raises
    ValueError where nothing can be blurred, warns where the window fits nowhere.
    """
    colors = zip(raster.indexes, raster.colorinterp)
    bands = [band for band, color in colors if color != ColorInterp.alpha]
    types = [raster.dtypes[band - 1] for band in bands]
    if not bands:
        raise ValueError(f"no band to blur, subdatasets to give: {raster.subdatasets}")
    if any("complex" in name for name in types):
        raise ValueError("complex numbers: give a raster of real numbers instead")
    if window > min(raster.shape):
        problem = "warning: smaller than the window, so all of the result is nodata"
        print(f"{raster.name}: {problem}", file=sys.stderr)
    return bands, np.result_type(np.float32, *types)


def read_rows(raster, bands, dtype, start, stop):
    """Return rows start to stop (excluded) as an array of shape (band, row, column).

    It is NaN where GDAL's mask says that a pixel is not valid.
    """
    values = np.empty((len(bands), stop - start, raster.width), dtype)
    tall, wide = raster.block_shapes[0]
    blocks = max(1, int(PIECE / (tall * wide * len(bands) * dtype.itemsize)))
    if wide < raster.width:  # tiles
        wide *= blocks
    else:  # strips
        tall *= blocks
    for top in range(start, stop, tall):
        for left in range(0, raster.width, wide):
            piece = values[:, top - start :, left:][:, :tall, :wide]
            _, rows, columns = piece.shape
            place = (top, top + rows), (left, left + columns)
            raster.read(bands, window=place, out=piece)
            piece[raster.read_masks(bands, window=place) == 0] = np.nan
    return values


def average(values, window, axis, output):
    """Put the means of window pixels along one axis of an array into output.

    Done along the rows and then along the columns it gives the mean over the square,
    as the square's kernel is the product of the two: 2 x window multiplications a
    pixel in place of window x window. Outside the array all is NaN. So a pixel is NaN
    exactly if its window reaches over the edge or touches NaN.
    """
    convolve1d(values, np.full(window, 1 / window), axis, output, "constant", np.nan)


def name_result(raster):
    """Return the result's path, smooth/NAME.tif, and make the folder if it is missing.

    Raises ValueError for a raster that its own result would overwrite.
    """
    name = os.path.splitext(os.path.basename(raster.name))[0] + ".tif"
    target = os.path.join("smooth", name)
    if os.path.realpath(target) in map(os.path.realpath, [raster.name, *raster.files]):
        raise ValueError(f"its result {target} would overwrite it: move it elsewhere")
    os.makedirs("smooth", exist_ok=True)
    return target


@contextlib.contextmanager
def new_result(target, raster, bands, dtype):
    """Open a GeoTIFF for writing, which is named target once it is whole.

    Yields a rasterio dataset with the raster's size, georeference and band metadata.
    Raises OSError where the file is not whole. After an error, SIGINT or SIGTERM
    nothing of it is left, and an earlier file of that name is as it was.
    """
    folder, name = os.path.split(target)
    for other in os.listdir(folder):
        if other.startswith(f".{name}."):
            problem = "note: left by a killed run, unless one is at work now"
            print(f"{os.path.join(folder, other)}: {problem}", file=sys.stderr)

    def stop(number, frame):
        on_signals(signal.SIG_IGN)  # the rest is cleaning up
        raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}, no result")

    on_signals(stop)
    height, width = raster.shape
    profile = {"width": width, "height": height, "count": len(bands), "dtype": dtype}
    profile |= {"nodata": np.nan, "interleave": "band", "rpcs": raster.rpcs}
    gcps, crs = raster.gcps
    place = {"gcps": gcps} if gcps else {"transform": raster.transform}
    place["crs"] = crs or raster.crs
    # Beside the target, as a file can be renamed only within its file system.
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder) as draft:
        draft = os.path.join(draft, name)
        try:
            with rasterio.open(draft, "w", "GTiff", **profile, **place) as result:
                point = raster.tags().get("AREA_OR_POINT", "Area")
                result.update_tags(AREA_OR_POINT=point)
                for item in ("descriptions", "scales", "offsets", "units"):
                    values = getattr(raster, item)
                    setattr(result, item, [values[band - 1] for band in bands])
                yield result
            check_blocks(draft)
        except rasterio.errors.RasterioError as error:
            problem = f"cannot write the result, is the disk full? {reason(error)}"
            raise OSError(problem) from error
        on_signals(signal.SIG_IGN)  # it is as good as done
        for ending in (".aux.xml", ".ovr", ".msk"):  # statistics of an earlier result
            with contextlib.suppress(FileNotFoundError):
                os.remove(target + ending)
        os.replace(draft, target)


def check_blocks(path):
    """Raise OSError where a block of a GeoTIFF is not in the file.

    When the disk fills as a file is closed, GDAL does not say so.
    """
    size = os.path.getsize(path)
    with rasterio.open(path) as raster:
        for band, (tall, _) in zip(raster.indexes, raster.block_shapes):
            for block in range(len(range(0, raster.height, tall))):
                begin = raster.get_tag_item(f"BLOCK_OFFSET_0_{block}", "TIFF", band)
                length = raster.get_tag_item(f"BLOCK_SIZE_0_{block}", "TIFF", band)
                if None in (begin, length) or int(begin) + int(length) > size:
                    raise OSError("the result is not whole: is the disk full?")


def on_signals(handler):
    """Have Ctrl-C and what Slurm sends at the time limit handled by handler."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def reason(error):
    """Return in one line why something failed, in GDAL's words where it has some."""
    from_gdal = isinstance(error, rasterio.errors.RasterioError)
    return " ".join(str(from_gdal and error.__cause__ or error).split())


def fail(kind, error, traceback):
    """Print one line in place of a traceback, and exit with 1."""
    print(f"{sys.argv[1]}: {reason(error) or kind.__name__}", file=sys.stderr)
    sys.stdout.flush()
    os._exit(1)


def main(path, window):
    """Blur the raster at path and print where the result is."""
    began = time.monotonic()
    with rasterio.open(path) as raster:
        bands, dtype = find_bands(raster, window)
        target = name_result(raster)
        values = read_rows(raster, bands, dtype, 0, raster.height)
        average(values, window, 1, output=values)
        average(values, window, 2, output=values)
        with new_result(target, raster, bands, dtype) as result:
            result.write(values)
    size = f"{raster.width} x {raster.height} pixels, window {window} x {window}"
    print(f"{target}: {size}, {time.monotonic() - began:.1f} seconds")


if __name__ == "__main__":
    arguments = parse_arguments(sys.argv[1:])
    # Errors are told by fail alone, not by libtiff as well, which writes to file 2.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.excepthook = fail
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends scipy's loops too
    main(*arguments)
