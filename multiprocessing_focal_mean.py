"""Blur a raster on several CPUs: each pixel becomes the mean of the window around it.

    python multiprocessing_focal_mean.py RASTER [WINDOW]

RASTER is what GDAL opens, WINDOW an odd number of pixels (15). The result, float32 or
float64, is smooth/NAME.tif: NaN where a window crosses an edge or has invalid pixels.
"""

import argparse
import contextlib
import ctypes
import math
import mmap
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import rasterio
from scipy.ndimage import convolve1d

CHUNK = 8e6  # bytes of a chunk of rows, few enough for the processor's cache
PROGRESS = "0...10...20...30...40...50...60...70...80...90...100"
os.environ["GDAL_CACHEMAX"] = "16"  # MB; GDAL would take 5 % of the node's memory


def main(path, window):
    """Blur the raster at path, chunk by chunk, and print where the result is."""
    began = time.monotonic()
    target = Path("smooth", Path(path).stem + ".tif")
    cpus = os.environ.get("SLURM_CPUS_PER_TASK", "")  # what Slurm gave to the job
    processes = int(cpus if cpus.isdecimal() else 0) or len(os.sched_getaffinity(0))
    with rasterio.open(path) as raster:
        bands, dtype = choose_bands(raster, window)
        chunks = split_rows(raster, bands, dtype, window, processes)
        # The ring bounds memory: all processes share its slots for a chunk and its halo.
        # A worker fills one, this process writes it, and only then it is filled again.
        slots = min(len(chunks), 2 * processes)
        shape = slots, len(bands), chunks[0][1] + window // 2, raster.width
        memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
        ring = np.frombuffer(memory, dtype).reshape(shape)
        fork = multiprocessing.get_context("fork")  # workers share the ring and imports
        pool = fork.Pool(processes, start_worker, [path, memory, ring])
        workers = set(multiprocessing.active_children())
        tasks = []
        shown = np.linspace(0, len(PROGRESS), len(chunks) + 1, dtype=int)
        with new_result(target, raster, bands, dtype) as result:
            for number, (start, stop) in enumerate(chunks):
                while len(tasks) < min(number + slots, len(chunks)):
                    task = bands, window, *chunks[len(tasks)], len(tasks) % slots
                    tasks.append(pool.apply_async(blur_chunk, task))
                first = finish(tasks[number], workers)
                means = ring[number % slots, :, first : first + stop - start]
                result.write(means, window=((start, stop), (0, raster.width)))
                memory.madvise(mmap.MADV_DONTNEED)  # as in blur_chunk
                print(PROGRESS[shown[number] : shown[number + 1]], end="", flush=True)
    print(" - done.")
    size = f"{raster.width} x {raster.height} pixels, window {window} x {window}"
    print(f"{target}: {size}, {time.monotonic() - began:.1f} seconds", flush=True)
    os._exit(0)  # as a Pool that closes can wait for ever for a worker that was killed


def choose_bands(raster, window):
    """Return the bands to blur, all but alpha, and the result's type, float32 or 64."""
    bands = [i for i in raster.indexes if raster.colorinterp[i - 1].name != "alpha"]
    dtype = np.result_type(np.float32, *[raster.dtypes[band - 1] for band in bands])
    if not bands or dtype.kind == "c":
        raise ValueError(f"no band of real numbers, but maybe in {raster.subdatasets}")
    if window > min(raster.shape):
        print(f"{raster.name}: warning: smaller than the window", file=sys.stderr)
    return bands, dtype


def split_rows(raster, bands, dtype, window, processes):
    """Return the first row of each even-sized chunk and the row after its last."""
    # CHUNK bytes, or the window's rows, in whole rows of blocks up to 4 x CHUNK.
    row = raster.width * len(bands) * dtype.itemsize  # bytes
    rows = max(window, int(CHUNK / row))
    block = raster.block_shapes[0][0]
    if block * row <= 4 * CHUNK:
        rows = math.ceil(rows / block) * block
    rows = min(rows, math.ceil(raster.height / processes))
    # The first one is longer, so that the halos of all others begin with a block.
    edges = range(rows + window // 2, raster.height, rows)
    return list(pairwise([0, *edges, raster.height]))


def start_worker(path, *shared):
    """Open the raster and keep the ring, in a worker, for all chunks that it blurs."""
    global raster, memory, ring, touched
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, the main process says why
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # end with it: PR_SET_PDEATHSIG
    if os.getppid() != multiprocessing.parent_process().pid:
        os._exit(1)  # it has ended already
    raster = rasterio.open(path)
    memory, ring = shared
    touched = set()


def blur_chunk(bands, window, start, stop, slot):
    """Leave the means of rows start to stop in a slot; return its row of the first."""
    halo = window // 2  # rows above and below the chunk that its means need
    top = max(0, start - halo)
    values = ring[slot, :, : min(raster.height, stop + halo) - top]
    try:
        read_rows(raster, bands, top, values)
    except Exception as error:  # a Pool would lose GDAL's words
        raise OSError(str(error.__cause__ or error)) from error
    average(values, window, axis=1)
    average(values[:, start - top : stop - top], window, axis=2)
    touched.add(slot)
    if len(touched) > 2:  # Slurm may count a slot for each process that has touched it
        memory.madvise(mmap.MADV_DONTNEED)  # forget where it is, not what is in it
        touched.clear()
    return start - top


def read_rows(raster, bands, top, values):
    """Fill values (band, row, column) with rows from top on, NaN where not valid."""
    # GDAL reads a part again for its mask: few blocks, which are in its cache then.
    tall, wide = np.maximum(raster.block_shapes[0], (256, 1024))
    for y in range(0, values.shape[1], tall):
        for x in range(0, raster.width, wide):
            part = values[:, y : y + tall, x : x + wide]
            place = rasterio.windows.Window(x, top + y, part.shape[2], part.shape[1])
            raster.read(bands, window=place, out=part)
            part[raster.read_masks(bands, window=place) == 0] = np.nan


def average(values, window, axis):
    """Replace values (band, row, column) by means of window pixels along an axis."""
    # A square is the product of two lines. Beyond the edge, and so in a mean, is NaN.
    weights = np.full(window, 1 / window)  # for another kernel change both scripts
    convolve1d(values, weights, axis, output=values, mode="constant", cval=np.nan)


def finish(task, workers):
    """Return what a task returns. It would wait for ever for a worker that was killed."""
    while not task.ready():
        if set(multiprocessing.active_children()) != workers:
            raise OSError("a worker was killed, likely as memory ran out: ask for more")
        task.wait(1)
    return task.get()


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
            # GDAL does not say so where the disk fills as it closes a file.
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
        reason = str(error) or "stopped, no result"
        print(f"{options.raster}: {' '.join(reason.split())}", file=sys.stderr)
        os._exit(1)  # as main does
