"""Blur a georeferenced raster: each pixel becomes the mean of the window around it.

    python multiprocessing_focal_mean.py RASTER [WINDOW]

RASTER  a raster that GDAL opens: a GeoTIFF, a virtual raster (.vrt), ...
WINDOW  side of the square window in pixels, an odd number; 15 unless given

The result is smooth/NAME.tif in the current folder, in floating point. A pixel whose
window reaches over the raster's edge, or touches a pixel that is not valid, becomes
nodata (NaN). Several processes work on chunks of rows, in memory that does not grow
with the raster's height.
"""

import contextlib
import functools
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from multiprocessing.sharedctypes import RawArray

import numpy as np
import rasterio
from rasterio.enums import ColorInterp
from scipy.ndimage import convolve1d

CHUNK = 8e6  # bytes of a chunk of rows, few enough for the processor's cache
PROGRESS = "0...10...20...30...40...50...60...70...80...90...100"
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


def count_processes():
    """Return the number of CPUs that Slurm gave, else those that this process has."""
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if slurm.isdecimal() and int(slurm) > 0:
        return int(slurm)
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def split_rows(raster, bands, dtype, window, processes):
    """Return the rows at which the even-sized chunks begin, and the raster's height.

    A chunk takes about CHUNK bytes, and at least window rows, as its halo should not
    outweigh it, rounded up to whole rows of blocks if one takes at most 8 x CHUNK. It
    begins window // 2 below them: so its halo touches one row of blocks more, not two.
    """
    row = raster.width * dtype.itemsize  # bytes
    rows = max(window, int(CHUNK / row / len(bands)))
    block = raster.block_shapes[0][0]
    if block * row * len(bands) <= 8 * CHUNK:
        rows = math.ceil(rows / block) * block
    rows = min(rows, math.ceil(raster.height / processes))
    return [0, *range(rows + window // 2, raster.height, rows), raster.height]


def start_worker(*shared):
    """Keep what all chunks need, and end this worker when its parent has ended."""
    global job
    job = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    sys.stderr = sys.__stderr__  # to /dev/null: the parent says what went wrong
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """Wait until the parent ends, even if it is killed, and end this process."""
    multiprocessing.parent_process().join()
    os._exit(1)


@functools.cache
def open_once(path):
    """Return the raster at path, which a worker opens for its first chunk."""
    return rasterio.open(path)


def blur_chunk(chunk):
    """Read a chunk, given by its number, with its halo; leave its mean in the ring."""
    path, window, bands, dtype, edges, shape, memory = job
    start, stop = edges[chunk : chunk + 2]
    try:
        raster = open_once(path)
        top = max(0, start - window // 2)
        bottom = min(raster.height, stop + window // 2)
        values = read_rows(raster, bands, dtype, top, bottom)
    except Exception as error:  # GDAL's words do not travel to the parent by themselves
        raise OSError(reason(error)) from error
    average(values, window, 1, output=values)
    ring = np.frombuffer(memory, dtype).reshape(shape)
    slot = ring[chunk % len(ring), :, : stop - start]
    average(values[:, start - top : stop - top], window, 2, output=slot)


def finish(task, workers):
    """Wait for a task. Raises its error, or OSError when a worker died meanwhile.

    A Pool replaces a dead worker, but its task would never end.
    """
    while set(multiprocessing.active_children()) == workers:  # else one has died
        if task.ready():
            return task.get()
        task.wait(1)
    raise OSError("a worker was killed, likely as memory ran out: ask for more")


def main(path, window):
    """Blur the raster at path and print where the result is."""
    began = time.monotonic()
    processes = count_processes()
    with rasterio.open(path) as raster:
        bands, dtype = find_bands(raster, window)
        target = name_result(raster)
        edges = split_rows(raster, bands, dtype, window, processes)
        chunks = len(edges) - 1
        # The ring has slots of one chunk each, in memory that all processes share. A
        # slot is filled by a worker, written to the result by this process, in order,
        # and filled again. So memory is bounded, even if the disk is slow. A worker
        # holds one more chunk, with its halo.
        shape = min(chunks, 2 * processes), len(bands), edges[1], raster.width
        memory = RawArray("b", math.prod(shape) * dtype.itemsize)
        ring = np.frombuffer(memory, dtype).reshape(shape)
        job = path, window, bands, dtype, edges, shape, memory
        pool = multiprocessing.Pool(processes, start_worker, job)
        workers = set(multiprocessing.active_children())
        with new_result(target, raster, bands, dtype) as result:
            first = range(len(ring))
            tasks = [pool.apply_async(blur_chunk, [chunk]) for chunk in first]
            for chunk in range(chunks):
                finish(tasks[chunk], workers)
                start, stop = edges[chunk : chunk + 2]
                values = ring[chunk % len(ring), :, : stop - start]
                result.write(values, window=((start, stop), (0, raster.width)))
                if len(tasks) < chunks:
                    tasks.append(pool.apply_async(blur_chunk, [len(tasks)]))
                shown, show = (len(PROGRESS) * (chunk + i) // chunks for i in (0, 1))
                print(PROGRESS[shown:show], end="", flush=True)
    print(" - done.")
    size = f"{raster.width} x {raster.height} pixels, window {window} x {window}"
    print(f"{target}: {size}, {time.monotonic() - began:.1f} seconds", flush=True)
    os._exit(0)  # a Pool that closes can wait for ever for a worker that was killed


if __name__ == "__main__":
    arguments = parse_arguments(sys.argv[1:])
    # Errors are told by fail alone, not by libtiff as well, which writes to file 2.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.excepthook = fail
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends scipy's loops too
    main(*arguments)
