"""Blur a raster on several CPUs: each pixel becomes the mean of the window around it.

    python multiprocessing_focal_mean.py RASTER [WINDOW]

RASTER is what GDAL opens, WINDOW an odd number of pixels (15). smooth/NAME.tif, the
result, is NaN if a pixel of the window is invalid or outside, as with terra's focal.
"""

import argparse
import contextlib
import ctypes
import math
import mmap
import os
import signal
import sys
import tempfile
import warnings
from itertools import pairwise, product
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from time import monotonic

import numpy as np
import rasterio
from scipy.ndimage import convolve1d

CHUNK = 8e6  # bytes of a chunk of rows, few enough for the processor's cache
PROGRESS = "0...10...20...30...40...50...60...70...80...90...100"
os.environ["GDAL_CACHEMAX"] = "12"  # MB; GDAL would take 5 % of the node's memory


def main(path, window):
    """Blur the raster at path, chunk by chunk, and print where the result is."""
    began = monotonic()
    target = Path("smooth", Path(path).stem + ".tif")
    cpus = os.environ.get("SLURM_CPUS_PER_TASK", "")  # what Slurm gave to the job
    processes = int(cpus if cpus.isdecimal() else 0) or len(os.sched_getaffinity(0))
    with rasterio.open(path) as raster:
        bands, dtype = choose_bands(raster, window)
        chunks = split_rows(raster, bands, dtype, window, processes)
        rounds = math.ceil(len(chunks) / processes)  # a worker mostly goes on downwards
        chunks = [chunk for i in range(rounds) for chunk in chunks[i::rounds]]
        # The ring bounds memory: forked processes share its slots for a chunk and halo.
        # A worker fills one, this process writes it, and only then it is filled again.
        slots = min(len(chunks), 2 * processes)
        shape = slots, len(bands), np.diff(chunks).max() + window - 1, raster.width
        memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
        ring = np.frombuffer(memory, dtype).reshape(shape)
        pool = get_context("fork").Pool(processes, start_worker, [path, memory, ring])
        workers = set(active_children())
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
                if ring[0].nbytes > 2 * CHUNK:  # as in blur_chunk
                    memory.madvise(mmap.MADV_DONTNEED)
                print(PROGRESS[shown[number] : shown[number + 1]], end="", flush=True)
    size = f"{raster.width} x {raster.height} pixels, window {window} x {window}"
    print(f" - done.\n{target}: {size}, {monotonic() - began:.1f} seconds", flush=True)
    os._exit(0)  # as a Pool that closes can wait for ever for a worker that was killed


def choose_bands(raster, window):
    """Return the bands, all but alpha, and the result's type; ValueError if none."""
    bands = [i for i in raster.indexes if raster.colorinterp[i - 1].name != "alpha"]
    dtype = np.result_type(np.float32, *[raster.dtypes[band - 1] for band in bands])
    if not bands or dtype.kind == "c":
        raise ValueError(f"no band of real numbers, but maybe in {raster.subdatasets}")
    if window > min(raster.shape):
        print(f"{raster.name}: warning: smaller than the window", file=sys.stderr)
    return bands, dtype


def split_rows(raster, bands, dtype, window, processes):
    """Return the even-sized chunks: each one's first row and the row after its last."""
    # CHUNK bytes, or the window's rows; whole rows of blocks if at most 4 x CHUNK.
    row = raster.width * len(bands) * dtype.itemsize  # bytes
    rows = max(window, int(CHUNK / row))
    block = raster.block_shapes[0][0]
    rows = math.ceil(rows / block) * block if block * row <= 4 * CHUNK else rows
    rows = min(rows, math.ceil(raster.height / processes))  # a chunk for each CPU
    # The first is half a window shorter: so the halo below a chunk ends with blocks.
    edges = range(-(window // 2) % rows or rows, raster.height, rows)
    return list(pairwise([0, *edges, raster.height]))


def start_worker(path, *shared):
    """Open the raster and keep the ring, in a worker, for all chunks that it blurs."""
    global raster, memory, ring, kept
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, the main process says why
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # end with it: PR_SET_PDEATHSIG
    assert os.getppid() == parent_process().pid  # it has not ended before
    raster = rasterio.open(path)
    memory, ring = shared
    kept = [None, None]  # a row, and all from there on that the last chunk has read


def blur_chunk(bands, window, start, stop, slot):
    """Leave the means of rows start to stop in a slot; return its row of the first."""
    halo = window // 2  # rows above and below the chunk that its means need
    top = max(0, start - halo)
    values = ring[slot, :, : min(raster.height, stop + halo) - top]
    known = kept[1] if kept[0] == top else values[:, :0]  # slow to read in tiles
    values[:, : known.shape[1]] = known
    try:
        read_rows(raster, bands, top + known.shape[1], values[:, known.shape[1] :])
    except Exception as error:  # a Pool would lose GDAL's words
        raise OSError(str(error.__cause__ or error)) from error
    kept[:] = stop - halo, values[:, stop - halo - top :].copy()
    average(values, window, axis=1)
    average(values[:, start - top : stop - top], window, axis=2)
    if ring.nbytes > 14 * CHUNK:  # Slurm may count it for each process that touches it
        memory.madvise(mmap.MADV_DONTNEED)  # unmap its pages here; the data stay
    return start - top


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


def finish(task, workers):
    """Return a task's result; OSError if a worker was killed: it would never come."""
    while not task.ready():
        if set(active_children()) != workers:
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
        reason = str(error) or "stopped, no result"
        print(f"{options.raster}: {' '.join(reason.split())}", file=sys.stderr)
        os._exit(1)  # as main does
