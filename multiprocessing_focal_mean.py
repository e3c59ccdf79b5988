"""Blur a raster on several CPUs: each pixel becomes the mean of the window around it.

    python multiprocessing_focal_mean.py RASTER [WINDOW] [--missing]

RASTER is what GDAL opens, WINDOW an odd number of pixels (15). smooth/NAME.tif, the
result, is NaN if a pixel of the window is invalid or outside, as with terra's focal.
With --missing, a raster is skipped that has it, of this window and not older.
"""

import argparse
import contextlib
import ctypes
import functools
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import warnings
from itertools import chain, pairwise, product
from pathlib import Path
from time import monotonic, time_ns

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.enums import ColorInterp, MaskFlags
from scipy.ndimage import convolve1d

CACHE = 48e6  # bytes of blocks that GDAL keeps, or a row of them that is larger
STOPS = signal.SIGINT, signal.SIGTERM  # Ctrl-C and Slurm's end
CUT = 64e6  # bytes of a row of blocks, above which the columns are cut, too
PIECE = 8e6  # bytes of a band blurred at a time, of all up to 4 x that; or WINDOW rows
PROGRESS = "0...10...20...30...40...50...60...70...80...90...100"


def main(path, window, missing):
    """Blur the raster at path, in chunks; print how far it is."""
    cpus = os.environ.get("SLURM_CPUS_PER_TASK", "")  # what Slurm gave to the job
    processes = int(cpus if cpus.isdecimal() else 0) or len(os.sched_getaffinity(0))
    with rasterio.open(path) as raster:
        if missing and has_result(raster, window):
            return say(f"{path}: skipped, as its result is there")
        groups, dtype = choose_bands(raster, window)
        chunks, columns = split_raster(raster, groups, window, processes)
        processes = min(processes, len(chunks))
        cache = set_cache(raster, groups[0], columns)
        # What a process holds: GDAL's cache, and a piece of so many rows and its halo.
        row = min(columns, raster.width) * dtype.itemsize  # bytes
        rows = max(window, int(PIECE / row / max(1, len(groups[0]) / 4)))
        rows = min(rows, max(bottom - top for _, _, (top, bottom) in chunks))
        piece = 1.1 * len(groups[0]) * row * (rows + 2 * window)
        check_memory(path, 0.9 * (1 + processes), processes * (1.2 * cache + piece))
        with new_result(raster, groups, dtype, window) as result:
            raster.close()  # or the processes would share its position in the file
            fork = multiprocessing.get_context("fork")
            done = fork.RawArray("d", len(chunks))  # how much of each chunk, up to 1
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # a worker just ends
            pool = fork.Pool(processes, start_worker, [path, done])
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            workers = set(multiprocessing.active_children())
            blur = functools.partial(blur_chunk, result, dtype, window, rows)
            wait_for(pool.imap_unordered(blur, enumerate(chunks)), workers, done)
            pool.close()
            for worker in workers:  # so that Slurm counts their time
                worker.join(5)
    os._exit(0)  # as the end of a Pool can wait for ever for a worker that was killed


def split_raster(raster, groups, window, processes):
    """Return chunks (bands, columns, rows), and how many columns GDAL has to keep."""
    # The rows are cut into even-sized parts. A process goes down a chunk, while GDAL
    # keeps a row of its blocks, so that it decompresses each once. Only if such a row is
    # larger than CUT are the columns cut, too, into strips of some two blocks or more,
    # as blocks at a cut are read from both sides.
    tall, wide = find_part(raster)
    blocks = math.ceil(raster.width / wide)
    fit = int(CUT / count_bytes(raster, groups[0], tall, wide))
    strips = math.ceil(blocks / max(2, fit))
    # So many parts that each process has as many chunks.
    parts = processes // math.gcd(processes, strips * len(groups))
    rows, columns = (
        list(pairwise(sorted({size * i // number for i in range(number + 1)})))
        for size, number in zip(raster.shape, (parts, strips), strict=True)
    )
    halo = window // 2
    keep = [
        math.ceil(min(right + halo, raster.width) / wide) - max(left - halo, 0) // wide
        for left, right in columns
    ]
    return list(product(groups, columns, rows)), max(keep) * wide


def start_worker(path, shared):
    """Note in a worker what all of its chunks need, and make it end with its parent."""
    global open_raster, done
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, the main process says why
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    # By Linux itself, as a worker may wait for the lock of one that was killed.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    assert os.getppid() == multiprocessing.parent_process().pid  # not ended before
    # Opened by the first chunk, as an error gets from there to the main process.
    open_raster = functools.cache(lambda: rasterio.open(path))
    done = shared


def blur_chunk(result, dtype, window, height, task):
    """Write the means of a chunk, in pieces of so many rows from the top down."""
    raster = open_raster()
    number, (bands, (left, right), (top, bottom)) = task
    halo = window // 2  # pixels around the chunk that its means need
    # Beyond the raster, rows are read as NaN, and columns are NaN to average.
    first, last = max(0, left - halo), min(right + halo, raster.width)
    values = make_array(len(bands), height + 2 * halo, last - first, dtype)
    kept = make_array(len(bands), 2 * halo, last - first, dtype)  # for the next piece
    read_part(raster, bands, top - halo, first, kept)
    for y in range(top, bottom, height):
        rows = min(height, bottom - y)
        piece = values[:, : rows + 2 * halo]
        piece[:, : 2 * halo] = kept
        read_part(raster, bands, y + halo, first, piece[:, 2 * halo :])
        kept[:] = piece[:, rows:]
        average(piece, window, axis=1)
        means = piece[:, halo : halo + rows]
        average(means, window, axis=2)
        means = means[:, :, left - first : right - first]  # without the halo
        write_part(result, bands, y, left, means)
        done[number] = (y + rows - top) / (bottom - top)


def wait_for(tasks, workers, done):
    """Print how much is done until all is; OSError if a worker was killed."""
    shown, waiting = 0, len(done)
    while waiting:
        with contextlib.suppress(multiprocessing.TimeoutError):
            tasks.next(0.1)  # raises at once what a worker has raised
            waiting -= 1
        # The Pool replaces a worker that was killed, but not its chunk.
        if set(multiprocessing.active_children()) != workers:
            raise OSError("a worker was killed, likely as memory ran out: ask for more")
        part = int(len(PROGRESS) * sum(done) / len(done))
        say(PROGRESS[shown:part], end="")
        shown = part
    say(" - done.")


# From here on, this is simple_focal_mean.py, word for word.


def choose_bands(raster, window):
    """Return the bands to read together, and the result's type; ValueError if none."""
    bands = [i for i in raster.indexes if raster.colorinterp[i - 1].name != "alpha"]
    types = [raster.dtypes[band - 1] for band in bands]
    if not bands and raster.subdatasets:
        names = "  ".join(raster.subdatasets[:4])
        raise ValueError(f"it has several variables, name one of them: {names}")
    if not bands or any("complex" in name for name in types):
        raise ValueError("no band of real numbers")
    if window > min(raster.shape):
        say(f"{raster.name}: warning: smaller than the window", file=sys.stderr)
    with rasterio.MemoryFile(ext=".vrt") as memory:  # where GDAL writes what it knows
        rasterio.shutil.copy(raster, memory.name, driver="VRT")
        if re.search(b"<(ColorTable|CategoryNames)", memory.read()):
            text = "warning: its numbers are codes, of which a mean says nothing"
            say(f"{raster.name}: {text}", file=sys.stderr)
    # A block holds all bands, or may hold them; else each band is read by itself.
    mixed = getattr(raster.interleaving, "name", raster.driver)
    together = mixed in ("pixel", "line", "VRT") and len(set(types)) == 1
    groups = [bands] if together else [[band] for band in bands]
    return groups, np.result_type(np.float32, *types)


def find_part(raster):
    """Return how many rows and columns to read at a time: whole blocks.

    They are few, as GDAL must still have them when it is asked which pixels are valid.
    """
    # Sheets of a virtual raster have blocks of their own, often of 512 x 512 pixels.
    block = np.maximum(raster.block_shapes[0], 512 if raster.driver == "VRT" else 1)
    tall, wide = block.tolist()
    wide *= math.ceil(512 / wide)
    return tall * math.ceil(min(64, 2**20 / wide) / tall), wide


def count_bytes(raster, bands, rows, columns):
    """Return the bytes of so many pixels in GDAL's cache, with a mask or alpha."""
    pixel = sum(np.dtype(raster.dtypes[band - 1]).itemsize for band in bands)
    masked = MaskFlags.per_dataset in raster.mask_flag_enums[0]
    return rows * columns * (pixel + 2 * masked)


def set_cache(raster, bands, columns):
    """Make GDAL keep a row of parts, not 5 % of a node's memory; return the bytes."""
    rows, wide = find_part(raster)  # and one part more: that which it is reading
    size = max(CACHE, 1.1 * count_bytes(raster, bands, rows, columns + wide))
    os.environ["GDAL_CACHEMAX"] = str(int(size / 1e6))  # read when a block is needed
    return min(size, 1.1 * count_bytes(raster, bands, *raster.shape))


def check_memory(path, processes, size):
    """Warn if the job has less memory than the run will take: how to ask Slurm for it.

    That is as much as so many processes like this one take now, and size bytes; the
    factors of both were fitted to measured runs.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1])  # Linux tells them
    size += processes * pages * os.sysconf("SC_PAGE_SIZE")
    names = "CPUS_ON_NODE", "MEM_PER_NODE", "MEM_PER_CPU"
    given = (os.environ.get(f"SLURM_{name}", "") for name in names)
    cpus, node, cpu = (int(text) if text.isdecimal() else 0 for text in given)
    need, granted = int(size / 2**20), node or cpu * cpus  # Slurm's MB are of 2^20
    if 0 < granted < need:
        more = need + need // 50  # as the next run may need somewhat more
        option = f"--mem={more}" if node else f"--mem-per-cpu={-(-more // cpus)}"
        text = f"needs some {need} MB, and the job has {granted}: sbatch {option} ..."
        say(f"{path}: warning: {text}", file=sys.stderr)


def make_array(bands, rows, columns, dtype):
    """Return an array (band, row, column) that is fast to average along its columns."""
    # Rows an odd number of cache lines of 64 bytes apart: if it is a multiple of 4096
    # bytes, all pixels of a column share a few lines of the processor's cache.
    line = 64 // dtype.itemsize
    width = (-(-columns // line) | 1) * line
    return np.empty((bands, rows, width), dtype)[:, :, :columns]


def read_part(raster, bands, top, left, values):
    """Fill values (band, row, column) from a row and column on, NaN where not valid.

    OSError if the raster is damaged.
    """
    bottom, right = top + values.shape[1], left + values.shape[2]
    if top < 0 or bottom > raster.height:
        values[:] = np.nan
    alphas = [i for i, kind in enumerate(raster.colorinterp, 1) if kind.name == "alpha"]
    tall, wide = find_part(raster)
    rows = split(max(top, 0), min(bottom, raster.height), tall)
    for place in product(rows, split(left, right, wide)):
        (y, below), (x, beside) = place
        part = values[:, y - top : below - top, x - left : beside - left]
        try:
            raster.read(bands, window=place, out=part)
            part[raster.read_masks(bands, window=place) == 0] = np.nan
            for alpha in alphas:  # of which GDAL makes a mask for 1 or 3 bands only
                part[:, raster.read(alpha, window=place) == 0] = np.nan
        except rasterio.errors.RasterioError as error:
            reason = error.__cause__ or error  # GDAL's words
            raise OSError(f"cannot read it, is it damaged? {reason}") from None


def split(start, stop, step):
    """Return the parts from start to stop, cut at multiples of step."""
    cuts = range(start // step * step, stop, step)
    return [(max(a, start), min(a + step, stop)) for a in cuts if start < stop]


def average(values, window, axis):
    """Replace values (band, row, column) by means of window pixels along an axis."""
    # Down, then across, makes a square. Pixels beyond the array count as NaN.
    # Another separable kernel stands here, in both scripts; then delete the results of
    # this one, as --missing knows only the window.
    weights = np.full(window, 1 / window)
    convolve1d(values, weights, axis, output=values, mode="constant", cval=np.nan)


def write_part(result, bands, top, left, means):
    """Write means (band, row, column) where their pixels lie in the result."""
    draft, starts, width = result
    # Rows as wide as the result follow one another in it: some 2**18 pixels at a time.
    step = 1 + 2**18 // width if means.shape[2] == width else 1
    with open(draft, "r+b") as file:
        for band, rows in zip(bands, means, strict=True):
            for y in range(0, len(rows), step):
                file.seek(starts[band] + ((top + y) * width + left) * means.itemsize)
                file.write(np.ascontiguousarray(rows[y : y + step]))


@contextlib.contextmanager
def new_result(raster, groups, dtype, window):
    """Yield where to write the means; give it its name, once whole, and print that.

    OSError if the disk is full, ValueError if the name is taken.
    """
    began = monotonic()
    names, target = [raster.name, *raster.files], find_result(raster.name)
    bands, made = list(chain(*groups)), f"{window} x {window}"
    check_earlier(names, target)
    target.parent.mkdir(exist_ok=True)
    for number in STOPS:
        signal.signal(number, signal.default_int_handler)
    text = f"{raster.width} x {raster.height} pixels, window {made}"
    tags = {"FOCAL_MEAN_WINDOW": made, "FOCAL_MEAN_OF": raster.name}
    folder = Path("smooth", f"{target.name}.{time_ns()}.unfinished")
    draft = folder / target.name
    try:
        folder.mkdir()
        try:
            lay_out(draft, raster, bands, dtype, tags)
            starts = dict(zip(bands, find_pixels(draft), strict=True))
        except Exception as error:  # noqa: BLE001
            raise OSError(f"cannot write it, is the disk full? {error}") from None
        yield draft, starts, raster.width
        if earlier := check_earlier(names, target):
            text += f", in place of an earlier result of window {earlier}"
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)  # the rest takes no time
        for ending in (".aux.xml", ".ovr", ".msk"):  # of an earlier result
            Path(f"{target}{ending}").unlink(missing_ok=True)
        for file in sorted(folder.iterdir(), reverse=True):  # the .tif at last
            file.replace(target.with_name(file.name))
        say(f"{target}: {text}, {monotonic() - began:.1f} seconds")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def lay_out(draft, raster, bands, dtype, tags):
    """Write a result without its pixels, for which it reserves the space."""
    size = {"width": raster.width, "height": raster.height, "count": len(bands)}
    place = {"transform": raster.transform, "gcps": raster.gcps[0]}
    with contextlib.suppress(KeyError):  # if they are not whole, no program uses them
        place["rpcs"] = raster.rpcs
    place["crs"] = raster.crs or raster.gcps[1] or rasterio.CRS()
    kind = {"driver": "GTiff", "dtype": dtype, "interleave": "band", "blockysize": 16}
    # While it has no nodata value, GDAL lays out its strips without writing them.
    rasterio.open(draft, "w", **size, **place, **kind).close()
    stale = "(?i)statistics|histogram|valid_|_range|fill|missing|sample|^(ns|bidx)$"
    with rasterio.open(draft, "r+") as result:
        result.nodata = np.nan
        for number, band in enumerate([0, *bands]):  # 0 is the raster
            kept = raster.tags(band).items()
            kept = {key: text for key, text in kept if not re.search(stale, key)}
            result.update_tags(number, **kept | ({} if band else tags))
        for item in ("descriptions", "scales", "offsets", "units", "colorinterp"):
            kept = [getattr(raster, item)[band - 1] for band in bands]
            # A palette becomes gray, as the result has no colour table.
            kept = [ColorInterp.gray if k is ColorInterp.palette else k for k in kept]
            setattr(result, item, kept)
    with open(draft, "r+b") as file:  # reserve the space: a full disk shows at once
        os.posix_fallocate(file.fileno(), 0, os.path.getsize(draft))


def find_pixels(draft):
    """Return the byte in a result at which each band begins; OSError if not in order."""
    with rasterio.open(draft) as result:  # fails if the disk was full for its head
        last = (result.height - 1) // 16  # strip; those before it are of 16 rows
        size = last * 16 * result.width * np.dtype(result.dtypes[0]).itemsize
        first, end = (
            [int(result.get_tag_item(key, "TIFF", i)) for i in result.indexes]
            for key in ("BLOCK_OFFSET_0_0", f"BLOCK_OFFSET_0_{last}")
        )
    if set(np.subtract(end, first)) != {size}:
        raise OSError("GDAL has not laid out its strips one behind the other")
    return first


def find_result(path):
    """Return smooth/NAME.tif: NAME is a file's, or all that tells apart what it has."""
    words = [path]
    if not os.path.exists(path):  # a driver, a file, what is in it; or an address
        words = list(filter(None, re.split(r'[":?,]+(?!//)', path)))
        words = words[len(words) > 1 and "/" not in words[0] :]
    for i, word in enumerate(words):
        file = len(words) == 1 or os.path.exists(word) or re.match(r"/vsi|\w+://", word)
        words[i] = Path(word).stem if file else re.sub(r"\W+", "_", word).strip("_")
    return Path("smooth", "_".join(words) + ".tif")


def check_earlier(names, target):
    """Return the window of the result that is there, if any; ValueError if not its own.

    The raster and its files have these names.
    """
    if not target.exists():
        return None
    tags = {}
    with contextlib.suppress(rasterio.errors.RasterioError):
        tags = rasterio.open(target).tags()
    of = tags.get("FOCAL_MEAN_OF", "")  # from which GDAL drops blanks in front
    path, file, *files = map(os.path.realpath, [names[0].lstrip(), target, *names])
    if file in files or os.path.realpath(of) != path:
        text = f"its result would overwrite {target}, which is no earlier one of it"
        raise ValueError(f"{text}: move that elsewhere")
    return tags["FOCAL_MEAN_WINDOW"]


def has_result(raster, window):
    """Tell whether a raster has a result of this window, no older than its files."""
    target = find_result(raster.name)
    earlier = check_earlier([raster.name, *raster.files], target)
    return earlier == f"{window} x {window}" and all(
        os.path.exists(file) and os.path.getmtime(file) <= os.path.getmtime(target)
        for file in raster.files or [""]  # if it has none, its age is unknown
    )


def say(*words, **options):
    """Print words at once; a log that is full or closed is no reason to fail."""
    with contextlib.suppress(OSError):
        print(*words, flush=True, **options)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # they are for programmers
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it as SIGTERM does
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("raster")
    parser.add_argument("window", type=int, nargs="?", default=15)
    parser.add_argument("--missing", action="store_true")
    options = parser.parse_args()
    if options.window < 1 or options.window % 2 == 0:
        parser.error("WINDOW must be an odd number of pixels")
    try:
        main(options.raster, options.window, options.missing)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
        reason = " ".join(str(error).split()).removeprefix(f"{options.raster}: ")
        say(f"{options.raster}: {reason or 'stopped, no result'}", file=sys.stderr)
        os._exit(1)  # at once, as other threads may never end
