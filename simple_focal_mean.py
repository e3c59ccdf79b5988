"""Blur a raster: each pixel becomes the mean of the square window around it.

    python simple_focal_mean.py RASTER [WINDOW]

RASTER is any raster that GDAL opens. WINDOW is the side of the square in pixels, an odd
number (15 if not given). The means go to smooth/NAME.tif. A mean is NaN, the result's
nodata, where the window holds an invalid pixel or reaches over the edge of the raster.
(The same rule as that of focal() in R's package terra for a projected raster.)
"""

import argparse
import collections
import contextlib
import ctypes
import errno
import math
import os
import re
import shutil
import signal
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import rasterio
from rasterio.dtypes import in_dtype_range
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import RasterioError
from scipy.ndimage import convolve1d

# What to blur at a time: pieces (bands, first row, end). And the bytes that this takes, in
# GDAL's cache and in all.
Plan = collections.namedtuple("Plan", "pieces cache memory")
# A result on its way: its file so far, its name in the end, the type of its pixels, and
# for each band the byte of the file where its rows start.
Result = collections.namedtuple("Result", "path target dtype starts")
# Formats in which a block of the file may hold many bands, though GDAL does not say so.
CUBES = "netCDF", "HDF5Image", "Zarr"
# The folder of an unfinished result. It has its name before it exists, so that fail can
# remove it at any moment.
FOLDER = Path("smooth", f"{os.urandom(8).hex()}.unfinished")


def main(path, window):
    """Blur the raster at path, one piece of it after the other."""
    with rasterio.open(path) as raster:
        plan = make_plan(raster, window, 0, raster.height)
        warn_of_memory(raster, plan.memory)
        result = start_result(raster, window)
        with rasterio.Env(GDAL_CACHEMAX=plan.cache):
            for number, piece in enumerate(plan.pieces):
                blur_piece(raster, window, result, *piece)
                show_progress(number, number + 1, len(plan.pieces))
        finish_result(raster, window, result)


def blur_piece(raster, window, result, bands, top, bottom):
    """Read a piece with its halo, average it, and write its means."""
    halo = window // 2  # rows above and below the piece that its means need, too
    values = read_rows(raster, bands, top - halo, bottom + halo, result.dtype)
    means = focal_mean(values, window)
    write_rows(result, bands, top, means)


def read_rows(raster, bands, top, bottom, dtype):
    """Return the rows from top up to bottom as an array (band, row, column).

    Invalid pixels are NaN, and so are rows that lie above or below the raster.
    """
    values = empty_rows(len(bands), bottom - top, raster.width, dtype)
    first, end = max(top, 0), min(bottom, raster.height)  # rows that the raster has
    values[:, : first - top] = np.nan
    values[:, end - top :] = np.nan
    for left, right in split_columns(raster):  # mostly once, for all columns
        box = (first, end), (left, right)
        part = values[:, first - top : end - top, left:right]
        raster.read(bands, window=box, out=part)
        hide_invalid(raster, bands, box, part)
    return values


def hide_invalid(raster, bands, box, values):
    """Make NaN of what nodata, a mask or an alpha band says is invalid.

    values (band, row, column) are those of the box, its (rows, columns) in the raster.
    """
    flags, nodata = raster.mask_flag_enums, raster.nodatavals  # of all bands
    for band, rows in zip(bands, values):
        value = nodata[band - 1]
        if value is not None and in_dtype_range(value, rows.dtype):
            if raster.dtypes[band - 1] == "float32":
                value = np.float32(value)  # 0.1 is rounded, as the pixels are
            rows[rows == value] = np.nan
    # GDAL's masks would do that, too, but not where a raster has a mask beside nodata.
    if any(MaskFlags.per_dataset in flags[band - 1] for band in bands):
        values[raster.read_masks(bands, window=box) == 0] = np.nan
    for alpha in find_alpha(raster):  # for GDAL, it is a mask of 1 or 3 bands only
        values[:, raster.read(alpha, window=box) == 0] = np.nan


def focal_mean(values, window):
    """Return the mean of the window around each pixel, for all rows but the halo's.

    values (band, row, column) must begin and end with the halo, and are overwritten.
    Any NaN in a window makes its mean NaN. For other weights, change weights; a median
    needs another function of scipy.ndimage: see README, Other filters.
    """
    weights = np.full(window, 1 / window)
    halo = window // 2
    # The mean down each column, and of these along each row, is the mean of the square:
    # with 2 x WINDOW multiplications a pixel, not WINDOW x WINDOW. (uniform_filter1d
    # needs fewer, but keeps a running sum, in which a NaN would stay to the end.)
    convolve1d(values, weights, axis=1, output=values)
    means = values[:, halo : values.shape[1] - halo]
    # Beyond the left and right edge is nothing: NaN.
    convolve1d(means, weights, axis=2, output=means, mode="constant", cval=np.nan)
    return means


def write_rows(result, bands, top, means):
    """Write means (band, row, column) to their place in the file, from row top on.

    Several processes can do so at a time, without a lock: the file is not compressed, so
    each row has its own bytes in it, and each row is written by one process only.
    """
    with open(result.path, "r+b", buffering=2**20) as file:
        for band, rows in zip(bands, means):
            file.seek(result.starts[band] + top * rows[0].nbytes)
            file.writelines(rows)


# That was the focal mean: at first reading, stop here. What follows is what real rasters
# need beside it: little memory, a result that is whole or absent, and what it says of
# itself.


def empty_rows(bands, height, width, dtype):
    """Return an array (band, row, column) with a gap of some bytes after each row.

    Without gaps, the rows of a width such as 4096 would lie a multiple of 4096 bytes
    apart. A column is then in few places of the processor's cache: ten times slower.
    """
    return np.empty((bands, height, width // 32 * 32 + 48), dtype)[:, :, :width]


def split_columns(raster):
    """Return the columns (first, end) that are read at a time.

    In CUBES, these are the columns of a block. For GDAL reads one band after the other: of
    all columns, the blocks could be so many that each is read anew for each band.
    """
    step = raster.block_shapes[0][1] if raster.driver in CUBES else raster.width
    return [(x, min(x + step, raster.width)) for x in range(0, raster.width, step)]


def make_plan(raster, window, top, bottom):
    """Return the Plan to blur the rows of a raster from top up to bottom."""
    bands, dtype = choose_bands(raster)
    row = (
        raster.width + 48
    ) * dtype.itemsize  # bytes of a row of one band, with its gap
    groups, number = group_bands(raster, bands, window, bottom - top, row)
    # Arrays of some 16 MB are quick, and of 64 MB where several bands are read together.
    # At least two windows high, as a piece averages its halo of one window, too.
    rows = max(2 * window, int(1.6e7 * min(number, 4) / number / row))
    rows = max(1, min(rows, bottom - top))
    pieces = list_pieces(groups, number, rows, top, bottom)
    cache = measure_cache(raster, window, number, rows, top, bottom)
    array = (rows + window) * number * row
    return Plan(pieces, cache, int(cache + 1.3 * array))  # 0.3 for which are invalid


def group_bands(raster, bands, window, height, row):
    """Return groups of bands that may share blocks, and how many bands to read at a time.

    A block that holds several bands is so decompressed once for them all. height is that
    of the rows to blur, and row the bytes of a row of one band.
    """
    least = 3 * window * row  # bytes of the lowest piece of one band, with its halo
    if holds_all_bands(raster) and raster.count < 128:
        return [bands], 1  # GDAL keeps all bands of a block, so read one by one
    if holds_all_bands(raster):  # it keeps those that are read together
        number = 2.5e8 / least
    elif raster.driver in ("VRT", *CUBES):  # unknown: together, but not above 250 MB
        number = 2.5e8 / (least + 2 * measure_blocks(raster)[1])
    else:  # each band has its own blocks: together only if that is little
        number = 1.6e7 / (height + window) / row
    if len(set(raster.dtypes)) > 1:
        number = 1  # rasterio reads bands of one type at a time
    number = min(max(1, int(number)), len(bands))
    return split(bands, number), number


def list_pieces(groups, number, rows, top, bottom):
    """Return pieces (bands, first row, end) of so many bands and rows.

    All bands of a group have their turn before the next rows, as they may share blocks.
    """
    return [
        (bands, row, min(row + rows, bottom))
        for group in groups
        for row in range(top, bottom, rows)
        for bands in split(group, number)
    ]


def split(bands, number):
    """Return the bands in lists of so many."""
    return [bands[i : i + number] for i in range(0, len(bands), number)]


def measure_cache(raster, window, number, rows, top, bottom):
    """Return the bytes that GDAL needs to keep the blocks of a piece in its cache.

    The next piece needs some of them again. Untold, GDAL takes 5 % of the computer's
    memory, not the job's. A piece has so many rows and so many (number) bands.
    """
    height, size = measure_blocks(raster)
    halo = window // 2
    end = min(bottom + halo, raster.height)
    most = math.ceil(end / height) - max(top - halo, 0) // height
    touched = min((rows + window) / height + 2, most)  # rows of blocks
    masked = MaskFlags.per_dataset in raster.mask_flag_enums[0] or find_alpha(raster)
    kept = raster.count if holds_all_bands(raster) else number
    return int(1.6e7 + touched * size * (kept + 1 if masked else kept))


def measure_blocks(raster):
    """Return how high a raster's blocks are, and the bytes of a row of them of one band."""
    height, width = find_block_height(raster), raster.block_shapes[0][1]
    columns = math.ceil(raster.width / width) * width
    return height, height * columns * max(np.dtype(t).itemsize for t in raster.dtypes)


def find_block_height(raster):
    """Return how many rows high a raster's blocks are.

    A virtual raster reads the blocks of its files: those of the first are a sample.
    """
    height = raster.block_shapes[0][0]
    if raster.driver == "VRT" and len(raster.files) > 1:
        with contextlib.suppress(RasterioError), rasterio.open(raster.files[1]) as file:
            height = max(height, find_block_height(file))
    return height


def holds_all_bands(raster):
    """Return whether a block of the raster's file holds the pixels of all bands."""
    return raster.tags(ns="IMAGE_STRUCTURE").get("INTERLEAVE") == "PIXEL"


def warn_of_memory(raster, memory, processes=1):
    """Tell what to ask Slurm for if a process may need more than --mem-per-cpu gave."""
    given = os.environ.get("SLURM_MEM_PER_CPU", "")
    needed = int((1.1 * memory + 1.3e8 * processes) / 2**20)  # 1.3e8 are Python's
    if given.isdecimal() and 0 < int(given) < needed:
        advice = f"low memory, sbatch --mem-per-cpu={needed}"
        say(f"{raster.name}: {advice}\n", sys.stderr)


def start_result(raster, window):
    """Write a GeoTIFF without pixels in FOLDER, and return what is known of it.

    OSError if it cannot be written, or would replace what is not its earlier result.
    """
    target = Path("smooth", name_result(raster))
    check_earlier(raster, target)
    bands, dtype = choose_bands(raster)
    path = FOLDER / target.name
    FOLDER.resolve().mkdir(
        parents=True
    )  # smooth may be a link to a folder that is gone
    try:
        write_head(path, raster, bands, dtype, window)
        starts = find_starts(path, bands)  # raises if the disk filled as it was closed
        with rasterio.open(path, "r+") as file:
            file.nodata = np.nan  # any earlier, and GDAL would write all the pixels
        starts = find_starts(path, bands)
        reserve_space(path)
    except RasterioError as error:
        raise OSError(f"cannot write it, is the disk full? {error}") from None
    return Result(path, target, dtype, starts)


def finish_result(raster, window, result):
    """Give the finished file its name in the folder smooth, and say so."""
    check_earlier(raster, result.target)  # another job may have made one meanwhile
    handle_signals(signal.SIG_IGN)  # what follows takes no time
    for ending in ".aux.xml", ".ovr", ".msk":  # they belong to an earlier result
        Path(f"{result.target}{ending}").unlink(missing_ok=True)
    for file in sorted(FOLDER.iterdir(), reverse=True):  # x.tif.aux.xml before x.tif
        file.replace(result.target.with_name(file.name))
    shutil.rmtree(FOLDER, ignore_errors=True)
    number = len(result.starts)
    size = (
        f"{raster.width} x {raster.height} pixels x {number} band{'s' * (number > 1)}"
    )
    say(f"{result.target}: {size}, window {window} x {window}\n", sys.stdout)


def name_result(raster):
    """Return the file name of the result of a raster."""
    if os.path.exists(raster.name):
        return f"{Path(raster.name).stem}.tif"
    # An address, or a variable in a file: without the signs that no file name can have.
    name = re.sub(r"[^\w.-]+", "_", public_name(raster)).removesuffix(".tif").strip("_")
    if len(name.encode()) > 200:  # too long for a file name
        name = f"{name.encode()[-190:].decode(errors='ignore')}_{checksum(name)}"
    return f"{name}.tif"


def check_earlier(raster, target):
    """FileExistsError if target is no earlier result of the raster, or if it reads it."""
    if not target.exists():
        return
    with rasterio.open(target) as earlier:
        source = earlier.tags().get("FOCAL_MEAN_OF", "")
    same = os.path.realpath(source) == os.path.realpath(public_name(raster))
    if not same or os.path.realpath(target) in map(
        os.path.realpath, find_files(raster)
    ):
        raise FileExistsError(f"it would overwrite {target}: move that elsewhere")


def find_files(raster):
    """Return the files that a raster consists of, and those of virtual rasters in it."""
    files = list(raster.files)
    for path in files:  # which grows meanwhile
        if path.endswith(".vrt"):
            with contextlib.suppress(RasterioError), rasterio.open(path) as inner:
                files += [name for name in inner.files if name not in files]
    return files


def write_head(path, raster, bands, dtype, window):
    """Write a GeoTIFF with all that it says of itself, and room for its pixels."""
    profile = {
        "driver": "GTiff",
        "width": raster.width,
        "height": raster.height,
        "count": len(bands),
        "dtype": dtype,
        "crs": raster.crs or raster.gcps[1] or rasterio.CRS(),
        "transform": raster.transform,
        "gcps": raster.gcps[0],
        # So that write_rows finds each row: one after the other, in this computer's
        # order of bytes, one band after the other.
        "blockysize": 1,
        "endianness": "NATIVE",
        "interleave": "band",
        "bigtiff": "IF_SAFER",
    }
    with rasterio.open(path, "w", **profile) as file:
        for number, band in enumerate([0, *bands]):  # 0 stands for the whole raster
            file.update_tags(number, **keep_tags(raster.tags(band)))
        file.update_tags(FOCAL_MEAN_OF=public_name(raster), FOCAL_MEAN_WINDOW=window)
        file.update_tags(ns="RPC", **raster.tags(ns="RPC"))
        for item in "descriptions", "units", "scales", "offsets":
            with contextlib.suppress(UnicodeDecodeError):  # a text in an older encoding
                of_all = getattr(raster, item)
                setattr(file, item, [of_all[band - 1] for band in bands])
        colors = [color.name.replace("palette", "gray") for color in raster.colorinterp]
        file.colorinterp = [ColorInterp[colors[band - 1]] for band in bands]


def keep_tags(tags):
    """Return the tags that are as true of the means as of the raster's pixels."""
    stale = "statistics_.*|nodata_values?|_?fill_?value|missing_value|.*_range"
    stale += "|valid_m(in|ax)|tifftag_m(in|ax)samplevalue"
    stale += "|ns|bidx"  # these are rasterio's own words
    # A netCDF file's tags begin with a variable's name, as red#valid_range does.
    pattern = re.compile(f"(.*#)?({stale})", re.IGNORECASE)
    return {key: text for key, text in tags.items() if not pattern.fullmatch(key)}


def public_name(raster):
    """Return the name of a raster for everybody to read, in one line.

    In an address, user:password@ is left out, and what follows a question mark, often a
    key or a signature, is made a number: addresses that differ there stay different.
    """
    name = raster.name
    if not os.path.exists(name):
        address, _, query = re.sub("//[^/@]*@", "//", name).partition("?")
        name = f"{address}?{checksum(query)}" if query else address
    return re.sub(r"[\s\0-\x1f]+", " ", name).strip()  # a tag can hold that


def checksum(text):
    """Return a short number, as text, that differs if the text does."""
    return f"{zlib.crc32(os.fsencode(text)):x}"


def find_starts(path, bands):
    """Return for each band the byte of a file where its rows start.

    RasterioError if the file is not whole, OSError if its rows lie in another order.
    """
    with rasterio.open(path) as file:
        row = file.width * np.dtype(file.dtypes[0]).itemsize
        first = int(file.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1))
        last = first + row * (file.height * file.count - 1)
        tag = f"BLOCK_OFFSET_0_{file.height - 1}"
        if file.get_tag_item(tag, "TIFF", bidx=file.count) != str(last):
            raise OSError("GDAL has not laid out its rows one after the other")
        return {band: first + i * file.height * row for i, band in enumerate(bands)}


def reserve_space(path):
    """Reserve a file's place on the disk: OSError if it is full, before any work is done.

    Where a disk cannot do that, writing the rows raises the error. (os.posix_fallocate
    would then write to the whole file itself, which takes long on a network's disk.)
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "r+b") as file:
        start, size = ctypes.c_int64(0), ctypes.c_int64(path.stat().st_size)
        failed = libc.fallocate(file.fileno(), 0, start, size)
    number = ctypes.get_errno()
    if failed and number in (errno.ENOSPC, errno.EDQUOT):  # EDQUOT: the user's share
        raise OSError(number, os.strerror(number))


def choose_bands(raster):
    """Return the numbers of the bands to blur, and the type of their means.

    OSError if there is none, or if one has complex numbers.
    """
    alpha = find_alpha(raster)
    bands = [band for band in raster.indexes if band not in alpha]
    types = [raster.dtypes[band - 1] for band in bands]
    if not bands or any("complex" in name for name in types):
        names = "  ".join(raster.subdatasets[:4])
        raise OSError(f"no band of real numbers; in it are: {names or 'no others'}")
    return bands, np.result_type(np.float32, *types)  # float64 if a type needs it


def find_alpha(raster):
    """Return the numbers of the bands that say which pixels are transparent."""
    colors = enumerate(raster.colorinterp, 1)
    return [band for band, color in colors if color == ColorInterp.alpha]


def show_progress(before, now, all):
    """Print what GDAL's programs print while so many pieces, of all, are done."""
    text = "0...10...20...30...40...50...60...70...80...90...100 - done.\n"
    first, end = (int(len(text) * number / all) for number in (before, now))
    say(text[first:end], sys.stdout)


def fail(path, reason):
    """End the run of the raster at path at once, without a result; say why."""
    handle_signals(signal.SIG_IGN)
    shutil.rmtree(FOLDER, ignore_errors=True)
    say(f"{path}: {reason}, no result\n", sys.stderr)
    os._exit(1)  # other threads, such as a Pool's, could wait for ever


def explain(error):
    """Return in one line why a run failed."""
    if isinstance(error, RasterioError):
        error = f"cannot read it: {error.__cause__ or error}"
    return " ".join(str(error).split()) or "not enough memory"


def say(text, file):
    """Print a text at once. If that fails, as the disk is full, the run goes on."""
    with contextlib.suppress(OSError, ValueError):
        print(text, end="", file=file, flush=True)


def handle_signals(handler):
    """Let handler handle the signals that end a job, but for those that are ignored."""
    names = "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"
    for number in [signal.Signals[name] for name in names]:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # they are for programmers
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("raster")
    parser.add_argument("window", type=int, nargs="?", default=15)
    options = parser.parse_args()
    if options.window < 1 or options.window % 2 == 0:
        parser.error("WINDOW must be an odd number of pixels")
    if os.sysconf("SC_OPEN_MAX") > 1000:  # files; GDAL keeps 100 of a virtual raster
        os.environ.setdefault("GDAL_MAX_DATASET_POOL_SIZE", "450")
    handle_signals(lambda number, frame: fail(options.raster, "stopped"))
    try:
        main(options.raster, options.window)
    except (OSError, RasterioError, UnicodeError, MemoryError) as error:
        fail(options.raster, explain(error))
    except Exception:  # noqa: BLE001
        sys.excepthook(
            *sys.exc_info()
        )  # a mistake in this script: the line where it is
        fail(options.raster, "stopped")
