"""Blur a raster on several CPUs: each pixel becomes the mean of the square around it.

    python multiprocessing_focal_mean.py RASTER [WINDOW]

RASTER is any raster that GDAL opens. WINDOW is the side of the square in pixels, an odd
number (15 if not given). The means go to smooth/NAME.tif, where NAME is the raster's name
without its ending; an earlier result of the raster is replaced. A mean is NaN, the
result's nodata, where the window holds an invalid pixel or extends beyond the raster: the
rule of focal() in R's package terra (except that terra joins the sides of a global raster).
"""

import argparse
import collections
import contextlib
import ctypes
import functools
import itertools
import math
import multiprocessing
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
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import RasterioError
from scipy.ndimage import convolve1d

# pieces: (bands, top, bottom) of each, to be blurred one after the other. Here and below,
# rows go from top up to bottom, without bottom itself. cache: bytes of GDAL's cache;
# memory: bytes in total.
Plan = collections.namedtuple("Plan", "pieces cache memory")
# path: the unfinished file; target: its final name; dtype: the type of its pixels; starts:
# a dictionary with the byte of the file where the rows of each band begin.
Result = collections.namedtuple("Result", "path target dtype starts")
# Formats whose blocks may hold many bands; GDAL does not tell whether they do.
CUBES = "netCDF", "HDF5Image", "Zarr"
# The folder of the unfinished file, named here so that fail can always remove it.
FOLDER = Path("smooth", f"{os.urandom(8).hex()}.unfinished")


def main(path, window):
    """Blur the raster at path: the workers of a Pool blur chunks of its rows."""
    cpus = count_cpus()
    # The part of each chunk that is blurred, from 0 to 1. It is global, and made before the
    # Pool starts, so that the workers share it.
    global done
    done = multiprocessing.RawArray("d", cpus)
    pool, workers = start_pool(cpus)  # before GDAL opens files, which cannot be shared
    with rasterio.open(path) as raster:
        plans = plan_chunks(raster, window, cpus)
        result = start_result(raster, window)
        blur = functools.partial(blur_chunk, path, window, result)
        wait_for(pool.imap_unordered(blur, enumerate(plans)))
        finish_result(raster, window, result)
    end_pool(pool, workers)


def count_cpus():
    """Return how many CPUs Slurm gave to the job, or else how many there are."""
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    return len(os.sched_getaffinity(0))


def plan_chunks(raster, window, cpus):
    """Return the Plans of as many even-sized chunks of rows as there are CPUs."""
    cuts = [raster.height * i // cpus for i in range(cpus + 1)]  # rows
    chunks = itertools.pairwise(cuts)
    plans = [make_plan(raster, window, top, bottom) for top, bottom in chunks]
    # For each CPU: 0.7 of Python's memory for its worker (the rest is shared), and a part,
    # 1 / cpus, of the memory of this process.
    memory = sum(plan.memory for plan in plans) / cpus
    warn_of_memory(raster, memory, pythons=0.7 + 1 / cpus)
    return plans


def blur_chunk(path, window, result, chunk):
    """Blur a chunk (its number, its Plan), one piece of it after the other."""
    number, plan = chunk
    try:
        with rasterio.open(path) as raster, rasterio.Env(GDAL_CACHEMAX=plan.cache):
            for count, piece in enumerate(plan.pieces, 1):
                blur_piece(raster, window, result, *piece)
                done[number] = count / len(plan.pieces)
    except RasterioError as error:
        raise OSError(explain(error)) from None  # as a Pool loses the error's cause
    done[number] = 1  # a chunk may have no rows


def start_pool(cpus):
    """Return a Pool of so many workers, and the workers; OSError if they cannot start.

    Signals such as Ctrl-C are held back meanwhile, as a new worker would handle them as
    this process does: it would remove the result. start_worker lets them in.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    context = multiprocessing.get_context("fork")
    try:
        pool = context.Pool(cpus, initializer=start_worker, initargs=[os.getpid()])
    except RuntimeError as error:
        raise OSError(f"cannot start {cpus} processes: {error}") from None
    workers = multiprocessing.active_children()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    return pool, workers


def start_worker(parent):
    """Let a worker end silently when it is told to, or when its parent process ends."""
    handle_signals(signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent
    # Let Linux kill the worker when its parent ends. Otherwise a worker could wait for ever
    # for a lock of the Pool, if another worker was killed while it held that.
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before prctl
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())


def wait_for(results):
    """Show the progress until all chunks are blurred; OSError if a worker was killed."""
    # A Pool starts a new worker in the place of one that was killed, but its chunk is
    # lost, and the Pool would wait for it for ever. The new worker has a new name.
    names = {f"ForkPoolWorker-{i + 1}" for i in range(len(done))}
    before, left = 0, len(done)
    while left:
        try:
            results.next(timeout=0.1)  # seconds; raises what a worker has raised
            left -= 1
        except multiprocessing.TimeoutError:
            pass  # no chunk was finished in that time
        if {worker.name for worker in multiprocessing.active_children()} != names:
            raise OSError("a worker was killed, likely as memory ran out: ask for more")
        now = sum(done)
        show_progress(before, now, len(done))
        before = now


def end_pool(pool, workers):
    """End the script without the Pool's own cleaning up, which can wait for ever."""
    pool.close()
    for worker in workers:  # Slurm counts the CPU time of workers that are waited for
        worker.join(timeout=5 / len(workers))  # at most 5 seconds for all
    os._exit(0)


# From here on, all is as in simple_focal_mean.py, word for word.


def blur_piece(raster, window, result, bands, top, bottom):
    """Read a piece with its halo, average it, and write its means."""
    halo = window // 2  # extra rows that are needed above and below the piece
    values = read_rows(raster, bands, top - halo, bottom + halo, result.dtype)
    means = focal_mean(values, window)
    write_rows(result, bands, top, means)


def read_rows(raster, bands, top, bottom, dtype):
    """Return the rows from top up to bottom as an array (band, row, column).

    Invalid pixels are NaN, and so are rows that lie above or below the raster.
    """
    values = empty_rows(len(bands), bottom - top, raster.width, dtype)
    first, end = max(top, 0), min(bottom, raster.height)  # the rows inside the raster
    values[:, : first - top] = np.nan  # the rows above the raster, if any
    values[:, end - top :] = np.nan  # the rows below it, if any
    for box in list_boxes(raster, first, end):  # mostly one box: all these rows
        (upper, lower), (left, right) = box  # rasterio calls this a window
        part = values[:, upper - top : lower - top, left:right]
        raster.read(bands, window=box, out=part)
        hide_invalid(raster, bands, box, part)
    return values


def hide_invalid(raster, bands, box, values):
    """Set to NaN the pixels that nodata, a mask or an alpha band marks as invalid.

    values (band, row, column) are the pixels of the box in the raster.
    """
    # If a raster has nodata and a mask, GDAL's mask leaves nodata out: so check both.
    nodata = raster.nodatavals  # of all bands
    for band, pixels in zip(bands, values):
        hide_nodata(pixels, nodata[band - 1], raster.dtypes[band - 1])
    if has_masks(raster):
        values[raster.read_masks(bands, window=box) == 0] = np.nan
    # A pixel whose alpha is 0 is transparent. GDAL's masks know that only if the raster has
    # 1 or 3 other bands: so read alpha itself.
    for alpha in find_alpha(raster):
        values[:, raster.read(alpha, window=box) == 0] = np.nan


def hide_nodata(pixels, nodata, file_dtype):
    """Set to NaN the pixels (row, column) of a band that have its nodata value.

    nodata is None if the band has no nodata value, or if its type cannot hold that value.
    file_dtype is the type of its pixels in the file.
    """
    if nodata is None:
        return
    if file_dtype == "float32":  # 0.1, for example, is rounded in such a file
        nodata = np.float32(nodata)
    pixels[pixels == nodata] = np.nan


def focal_mean(values, window):
    """Return the mean of the window around each pixel, without the rows of the halo.

    values (band, row, column) begin and end with the rows of the halo. They are
    overwritten. A mean is NaN if its window contains a NaN.
    """
    weights = np.full(window, 1 / window)  # for a Gaussian filter, put its weights here
    halo = window // 2
    # First the mean down each column, then along each row: the mean of the square, with
    # 2 x WINDOW multiplications a pixel instead of WINDOW x WINDOW. In the rows of the halo
    # the first mean is wrong, as rows beyond them are missing: so they are cut off. (SciPy's
    # uniform_filter keeps a running sum: after one NaN, it would give NaN to the line's end.)
    # Each result overwrites its array, which SciPy allows.
    convolve1d(values, weights, axis=1, output=values)
    means = values[:, halo : values.shape[1] - halo]
    # Beyond the left and right edge of the raster there is nothing: NaN.
    convolve1d(means, weights, axis=2, output=means, mode="constant", cval=np.nan)
    return means


def write_rows(result, bands, top, means):
    """Write means (band, row, column) to their place in the file, from row top on.

    The processes of multiprocessing_focal_mean.py do so at the same time, without a lock:
    the file is not compressed (see write_head), so each row has its own bytes in it, and
    only one process writes them.
    """
    with open(result.path, "r+b", buffering=2**20) as file:
        for band, rows in zip(bands, means):
            row_bytes = rows[0].nbytes
            file.seek(result.starts[band] + top * row_bytes)
            file.writelines(rows)  # the bytes of one row after the other


# That was the focal mean: on a first reading, stop here. The rest is care for real rasters:
# how much to hold in memory, how to write a result that is complete or absent, and what
# it says of itself.


def empty_rows(bands, height, width, dtype):
    """Return an array (band, row, column) with a gap of unused bytes after each row.

    Without gaps, rows of 1024, 2048 or 4096 columns would begin a multiple of 4096 bytes
    apart. The pixels of a column then compete for the same few places in the processor's
    cache, and the pass down the columns is much slower.
    """
    columns = width // 32 * 32 + 48  # 17 to 48 more; never a multiple of 32
    return np.empty((bands, height, columns), dtype)[:, :, :width]


def list_boxes(raster, first, end):
    """Return the boxes, ((upper, lower), (left, right)), in which to read some rows.

    Mostly it is one box of all these rows. But GDAL reads one band of a box after the
    other. If bands share parts of the file, a large box would push these out of memory
    before the next band needs them.
    """
    height, width = end - first, raster.width
    if raster.driver in CUBES:
        width = raster.block_shapes[0][1]  # one column of blocks at a time
    elif find_order(raster) == "LINE":
        height = 1  # in the file, a row of all bands comes before the next row
    rows = [(y, min(y + height, end)) for y in range(first, end, height)]
    columns = [(x, min(x + width, raster.width)) for x in range(0, raster.width, width)]
    return [(some_rows, some_columns) for some_rows in rows for some_columns in columns]


def make_plan(raster, window, top, bottom):
    """Return the Plan to blur the rows of a raster from top up to bottom.

    Its pieces are small, so that memory does not grow with the height of the raster. It
    grows with the window, the width, and the size of the blocks.
    """
    bands, dtype = choose_bands(raster)
    row_bytes = (raster.width + 48) * dtype.itemsize  # of one band, with the gap
    together = count_together(raster, bands, window, bottom - top, row_bytes)
    height = min(choose_height(window, together, row_bytes), bottom - top)
    pieces = list_pieces(raster, bands, together, height, top, bottom)
    # Memory: the blocks in GDAL's cache, the array of a piece with its halo, and 0.3 of the
    # array (measured) for what is needed beside it, such as masks.
    tall = height + window
    # A whole window instead of the halo: a little more than is needed.
    cache = measure_cache(raster, together, tall, top - window, bottom + window)
    array = tall * together * row_bytes
    return Plan(pieces, cache, int(cache + 1.3 * array))


def count_together(raster, bands, window, rows, row_bytes):
    """Return how many bands to read at a time, as one array.

    A block of the file may hold many bands. It is read and decompressed only once if all
    of them are read at a time, or if GDAL's cache keeps it until the last one is read.
    """
    order = find_order(raster)
    if order == "PIXEL" and raster.count < 128:
        return 1  # GDAL's cache keeps all bands of a block, if these are up to 127
    if len(set(raster.dtypes)) > 1:
        return 1  # rasterio reads bands of one type at a time
    # As many as fit in 250 MB. Each needs at least two windows of rows and the halo.
    band_bytes = 3 * window * row_bytes
    if order == "PIXEL":  # of 128 bands or more
        most = 2.5e8 / band_bytes
    elif order == "LINE" or raster.driver in ("VRT", *CUBES):
        # GDAL's cache needs about two rows of blocks for each.
        _, blocks_bytes = measure_blocks(raster)
        most = 2.5e8 / (band_bytes + 2 * blocks_bytes)
    else:  # the bands lie apart: read several only if they fit into 16 MB as a whole
        most = 1.6e7 / ((rows + window) * row_bytes)
    return max(1, min(int(most), len(bands)))


def choose_height(window, together, row_bytes):
    """Return how many rows a piece may have.

    Pieces of 16 MB are fast, and of up to 64 MB if bands are read together. They are at
    least two windows high: lower ones would take long for their halo.
    """
    piece_bytes = 1.6e7 * min(together, 4)
    return max(2 * window, int(piece_bytes / (together * row_bytes)))


def list_pieces(raster, bands, together, height, top, bottom):
    """Return the pieces (bands, top, bottom), in the order in which they are blurred."""
    groups = [bands[i : i + together] for i in range(0, len(bands), together)]
    tops = range(top, bottom, max(1, height))  # without rows, height is 0: no step
    rows = [(row, min(row + height, bottom)) for row in tops]
    if find_order(raster) == "PIXEL":  # the bands share blocks: all bands of some rows
        return [(group, *some_rows) for some_rows in rows for group in groups]
    return [(group, *some_rows) for group in groups for some_rows in rows]


def measure_cache(raster, together, height, top, bottom):
    """Return how many bytes GDAL's cache needs to keep the blocks of a piece.

    The next piece needs some of these blocks again. By default, GDAL takes 5 % of the
    whole computer's memory, which may be more than the job has. The height is that of a
    piece with its halo. All pieces lie between the rows top and bottom.
    """
    block_height, blocks_bytes = measure_blocks(raster)
    # Most blocks are touched if the first row is the last one of its block.
    touched = 1 + math.ceil((height - 1) / block_height)
    first = max(top, 0) // block_height
    end = math.ceil(min(bottom, raster.height) / block_height)
    # How many bands' blocks are kept. A block by PIXEL has all bands.
    kept = raster.count if find_order(raster) == "PIXEL" else together
    if has_masks(raster) or find_alpha(raster):
        kept += 1  # a mask has blocks, too
    return int(1.6e7 + min(touched, end - first) * blocks_bytes * kept)


def measure_blocks(raster):
    """Return the height of a raster's blocks, and the bytes of one band's row of blocks."""
    height, width = find_block_height(raster), raster.block_shapes[0][1]
    blocks = math.ceil(raster.width / width)  # the last may extend beyond the raster
    pixel_bytes = max(np.dtype(name).itemsize for name in raster.dtypes)
    return height, blocks * width * height * pixel_bytes


def find_block_height(raster):
    """Return the height of a raster's blocks in pixels.

    A virtual raster reads the blocks of its files: one of them has to stand for all.
    """
    height = raster.block_shapes[0][0]
    if raster.driver == "VRT" and len(raster.files) > 1:  # files[0] is itself
        with contextlib.suppress(RasterioError), rasterio.open(raster.files[1]) as file:
            height = max(height, find_block_height(file))
    return height


def has_masks(raster):
    """Return whether a band has a mask besides its nodata value."""
    for flags, nodata in zip(raster.mask_flag_enums, raster.nodatavals):
        # What GDAL says of a band without a mask.
        usual = MaskFlags.all_valid if nodata is None else MaskFlags.nodata
        if flags != [usual]:
            return True
    return False


def find_order(raster):
    """Return how bands lie in a file: by PIXEL, by LINE, each BAND by itself, or unknown."""
    return raster.tags(ns="IMAGE_STRUCTURE").get("INTERLEAVE", "unknown")


def warn_of_memory(raster, memory, pythons=1):
    """Tell what to ask Slurm for if a CPU may need more than --mem-per-cpu gave.

    It needs memory (bytes), and pythons times what Python and its libraries take. (That is
    no whole number in multiprocessing_focal_mean.py.)
    """
    given = os.environ.get("SLURM_MEM_PER_CPU", "")
    python_bytes = 1.3e8 * pythons
    needed = int((1.1 * memory + python_bytes) / 2**20)
    if given.isdecimal() and 0 < int(given) < needed:
        advice = f"low memory, sbatch --mem-per-cpu={needed}"
        say(f"{hide_secrets(raster.name)}: {advice}\n", sys.stderr)


def start_result(raster, window):
    """Write a GeoTIFF without pixels in FOLDER, and return its Result.

    OSError if it cannot be written, or would replace what is not its earlier result.
    """
    target = Path("smooth", name_result(raster))
    check_earlier(raster, target)
    bands, dtype = choose_bands(raster)
    path = FOLDER / target.name
    # The folder smooth may be a link to a folder that is gone.
    FOLDER.resolve().mkdir(parents=True)
    try:
        write_head(path, raster, bands, dtype, window)
        # Only a check: on a full disk, GDAL silently leaves a damaged file. For that,
        # find_starts raises RasterioError, but opening it to write another error.
        find_starts(path, bands)
        with rasterio.open(path, "r+") as file:
            file.nodata = np.nan  # last, or else GDAL would fill the file with it
        starts = find_starts(path, bands)
    except RasterioError as error:
        raise OSError(f"cannot write it, is the disk full? {error}") from None
    return Result(path, target, dtype, starts)


def finish_result(raster, window, result):
    """Give the finished file its name in the folder smooth, and say so."""
    check_earlier(raster, result.target)  # another job may have made one meanwhile
    handle_signals(signal.SIG_IGN)  # no interruption from here on
    for ending in ".aux.xml", ".ovr", ".msk":  # they belong to an earlier result
        if os.path.exists(f"{result.target}{ending}"):
            os.remove(f"{result.target}{ending}")
    for file in sorted(FOLDER.iterdir(), reverse=True):  # the .tif comes last
        file.replace(result.target.with_name(file.name))
    shutil.rmtree(FOLDER, ignore_errors=True)
    count = len(result.starts)
    bands = "1 band" if count == 1 else f"{count} bands"
    size = f"{raster.width} x {raster.height} pixels x {bands}"
    say(f"{result.target}: {size}, window {window} x {window}\n", sys.stdout)


def name_result(raster):
    """Return the file name of the result of a raster."""
    if os.path.exists(raster.name):
        return f"{Path(raster.name).stem}.tif"
    # An address, or a variable in a file: keep only letters, digits and a few signs.
    name = re.sub(r"[^\w.-]+", "_", hide_secrets(raster.name))
    name = name.removesuffix(".tif").strip("_")
    if len(name.encode()) > 200:  # too long for a file name
        name = f"{name.encode()[-190:].decode(errors='ignore')}_{checksum(name)}"
    return f"{name}.tif"


def check_earlier(raster, target):
    """Raise FileExistsError unless target is free or this raster's earlier result."""
    if not target.exists():
        return
    source = ""
    with contextlib.suppress(RasterioError), rasterio.open(target) as earlier:
        source = earlier.tags().get("FOCAL_MEAN_OF", "")
    ours = os.path.realpath(source.strip()) == os.path.realpath(name_source(raster))
    inputs = [os.path.realpath(path) for path in list_inputs(raster)]
    # A virtual raster may read its own earlier result.
    if not ours or os.path.realpath(target) in inputs:
        raise FileExistsError(f"it would overwrite {target}: move that elsewhere")


def list_inputs(raster):
    """Return the files that a raster consists of, and those of virtual rasters in it."""
    files = list(raster.files)
    for path in files:  # the loop also reaches the files that it adds
        if path.lower().endswith(".vrt"):
            with contextlib.suppress(RasterioError), rasterio.open(path) as inner:
                files += [name for name in inner.files if name not in files]
    return files


def write_head(path, raster, bands, dtype, window):
    """Write a GeoTIFF with all that it says of itself, but without its pixels."""
    profile = {
        "driver": "GTiff",
        "width": raster.width,
        "height": raster.height,
        "count": len(bands),
        "dtype": dtype,
        "crs": raster.crs or raster.gcps[1] or rasterio.CRS(),
        "transform": raster.transform,
        "gcps": raster.gcps[0],
        # So that write_rows finds each row: not compressed, one after the other, in this
        # computer's byte order, one band after the other.
        "compress": "NONE",
        "blockysize": 1,
        "endianness": "NATIVE",
        "interleave": "band",
        "bigtiff": "IF_SAFER",
    }
    with rasterio.open(path, "w", **profile) as file:
        # Numbers of bands in the result and in the raster; 0 is the whole file.
        for new, old in enumerate([0, *bands]):
            file.update_tags(new, **keep_tags(raster.tags(old)))
        file.update_tags(FOCAL_MEAN_OF=name_source(raster), FOCAL_MEAN_WINDOW=window)
        file.update_tags(ns="RPC", **raster.tags(ns="RPC"))
        for item in "descriptions", "units", "scales", "offsets":
            with contextlib.suppress(UnicodeDecodeError):  # a text in an older encoding
                of_all = getattr(raster, item)
                setattr(file, item, [of_all[band - 1] for band in bands])
        # A mean is no longer the number of a colour in a palette.
        colors = [color.name.replace("palette", "gray") for color in raster.colorinterp]
        file.colorinterp = [ColorInterp[colors[band - 1]] for band in bands]


def keep_tags(tags):
    """Return the tags of a raster or band without those that tell of its values."""
    dropped = "statistics_.*|nodata_values?|_?fill_?value|missing_value|.*_range"
    dropped += "|valid_m(in|ax)|tifftag_m(in|ax)samplevalue"
    dropped += "|ns|bidx"  # update_tags would take these for its own parameters
    # A netCDF file's tags begin with a variable's name, as red#valid_range does.
    pattern = re.compile(f"(.*#)?({dropped})", re.IGNORECASE)
    return {key: text for key, text in tags.items() if not pattern.fullmatch(key)}


def name_source(raster):
    """Return the name of a raster for the tag FOCAL_MEAN_OF: in one line, no secrets."""
    name = hide_secrets(raster.name)
    if os.path.exists(name):
        name = os.path.realpath(name)
    elif not re.search("[:/]/", name):  # no address, no absolute path in it
        name += f" in {os.getcwd()}"
    return re.sub(r"[\0-\x1f]", "?", name).strip()


def find_starts(path, bands):
    """Return for each band the byte of a file where its rows start.

    RasterioError if the file is damaged, OSError if its rows are not in order.
    """
    with rasterio.open(path) as file:
        row_bytes = file.width * np.dtype(file.dtypes[0]).itemsize
        first = int(file.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1) or 0)
        last = first + row_bytes * (file.height * file.count - 1)
        tag = f"BLOCK_OFFSET_0_{file.height - 1}"  # a block is a row
        if file.get_tag_item(tag, "TIFF", bidx=file.count) != str(last):
            raise OSError("GDAL has not laid out its rows one after the other")
        size = file.height * row_bytes
        return {band: first + i * size for i, band in enumerate(bands)}


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


def show_progress(before, now, total):
    """Print the next part of GDAL's progress line: from before to now, of total."""
    text = "0...10...20...30...40...50...60...70...80...90...100 - done.\n"
    first, end = (int(len(text) * number / total) for number in (before, now))
    say(text[first:end], sys.stdout)


def fail(path, reason):
    """End the run at once, without a result; say why, but no secrets of the path."""
    handle_signals(signal.SIG_IGN)
    shutil.rmtree(FOLDER, ignore_errors=True)
    line = f"{path}: {reason}, no result\n"
    say(line.replace(path, hide_secrets(path)), sys.stderr)
    os._exit(1)  # without waiting for threads: those of a Pool could wait for ever


def explain(error):
    """Return in one line why a run failed."""
    if isinstance(error, RasterioError):
        error = f"cannot read it: {error.__cause__ or error}"
    text = " ".join(str(error).split())
    return text or "not enough memory"  # a MemoryError has no text


def hide_secrets(name):
    """Return the name of a raster without secrets, if it is an address on the web.

    user:password@ is left out, and what follows a question mark, often a key, becomes a
    number. So addresses that differ there still have different names.
    """
    if os.path.exists(name) or not re.search("(?i)https?:|ftps?:|/vsi", name):
        return name
    address, _, query = re.sub(r"(\w+://)[^/]*@", r"\1", name).partition("?")
    return f"{address}?{checksum(query)}" if query else address


def checksum(text):
    """Return a short number, as text, that almost always differs if the text does."""
    return f"{zlib.crc32(os.fsencode(text)):x}"


def handle_signals(handler):
    """Let handler handle the signals that end a job, except ignored ones (by nohup)."""
    names = "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"
    for number in [signal.Signals[name] for name in names]:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def say(text, file):
    """Print a text at once. If that fails, the run goes on.

    It fails if the disk is full (OSError), or if an encoding lacks a letter (ValueError).
    """
    with contextlib.suppress(OSError, ValueError):
        print(text, end="", file=file, flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # they are for programmers
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("raster")
    parser.add_argument("window", type=int, nargs="?", default=15)
    options = parser.parse_args()
    if options.window < 1 or options.window % 2 == 0:
        parser.error("WINDOW must be an odd number of pixels")
    # Let GDAL keep 450 files of a virtual raster open, not 100, if a process may have 1000.
    if os.sysconf("SC_OPEN_MAX") > 1000:
        os.environ.setdefault("GDAL_MAX_DATASET_POOL_SIZE", "450")
    handle_signals(lambda number, frame: fail(options.raster, "stopped"))
    try:
        main(options.raster, options.window)
    except (OSError, RasterioError, UnicodeError, MemoryError) as error:
        fail(options.raster, explain(error))
    except Exception:  # noqa: BLE001
        # A mistake in this script itself: show its line.
        sys.excepthook(*sys.exc_info())
        fail(options.raster, "stopped")
