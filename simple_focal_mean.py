"""Blur a raster: each pixel becomes the mean of the square window around it.

    python simple_focal_mean.py RASTER [WINDOW]

RASTER is what GDAL opens, WINDOW an odd number of pixels (15). smooth/NAME.tif gets
the means: NaN where a pixel of the window is invalid or outside, as with terra's focal.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import rasterio
from rasterio.enums import ColorInterp, MaskFlags
from scipy.ndimage import convolve1d

FOLDER = Path("smooth", f"{os.urandom(8).hex()}.unfinished")  # of this run's draft


def main(path, window):
    """Blur the raster at path, a piece of its rows after the other."""
    with rasterio.open(path) as raster:
        pieces, size = split_rows(raster, window, 0, raster.height)
        check_memory(raster, size, pythons=1)
        with new_result(raster, window) as layout:
            for piece in pieces:
                blur_piece(raster, window, layout, *piece)


def split_rows(raster, window, top, bottom):
    """Return pieces (bands, top, bottom) of rows, and the bytes that blurring takes."""
    bands, dtype = choose_bands(raster)
    sizes = [np.dtype(name).itemsize for name in raster.dtypes]  # bytes of a pixel
    # A block that holds all bands is decompressed once if they are blurred together.
    order = getattr(raster.interleaving, "name", raster.driver)
    fits = order == "VRT" and 1100 * raster.width * sum(sizes) < 3e8  # two block rows
    groups = [bands] if fits or order in ("pixel", "line") else [[n] for n in bands]
    tall, wide = raster.block_shapes[0]
    tall = max(tall, 512 if raster.driver == "VRT" else 1)
    usual = 16e6 / (raster.width + 48) / dtype.itemsize  # rows that take 16 MB
    step = int(max(2 * window, min(usual, tall), usual / len(groups[0])))
    # GDAL must keep all blocks that a piece and its halo touch: each of its bands, and
    # the next piece, needs them again. Untold, it takes 5 % of the memory that it sees.
    first, last = max(top - window // 2, 0), min(bottom + window // 2, raster.height)
    blocks = min((step + window) // tall + 2, -(-last // tall) - first // tall)
    mask = MaskFlags.per_dataset in raster.mask_flag_enums[0]  # a byte or none
    pixel = mask + (sum(sizes) if len(groups) == 1 else max(sizes))  # bytes
    cache = int(16e6 + blocks * tall * -(-raster.width // wide) * wide * pixel)
    os.environ["GDAL_CACHEMAX"] = str(cache)
    array = (min(step, bottom - top) + window) * (raster.width + 48) * dtype.itemsize
    tops = range(top, bottom, step)
    pieces = [(group, y, min(y + step, bottom)) for group in groups for y in tops]
    return pieces, cache + array


def check_memory(raster, size, pythons):
    """Tell what to ask Slurm for if a run may need more than --mem-per-cpu gave."""
    given = os.environ.get("SLURM_MEM_PER_CPU", "")
    mb = int((1.1 * size + pythons * 1.3e8) / 2**20)
    if given.isdecimal() and 0 < int(given) < mb:
        print(f"{raster.name}: low memory, sbatch --mem-per-cpu={mb}", file=sys.stderr)


def blur_piece(raster, window, layout, bands, top, bottom):
    """Write the means of a piece, some rows of bands, where the layout says."""
    draft, places, dtype = layout
    start, end = top - window // 2, bottom + window // 2  # rows, with the halo
    masked = any(MaskFlags.all_valid not in flags for flags in raster.mask_flag_enums)
    alphas = [band for band in raster.indexes if band not in places]
    try:
        if len(bands) > 100:  # of over 127 bands, GDAL keeps only what is asked for
            tall = raster.block_shapes[0][0]
            for y in range(max(start, 0) // tall * tall, min(end, raster.height), tall):
                raster.read(window=((y, y + 1), (0, raster.width)))
        with open(draft, "r+b", buffering=2**20) as file:
            for band in bands:
                values = read_rows(raster, band, masked, alphas, dtype, start, end)
                file.seek(places[band] + top * raster.width * dtype.itemsize)
                file.writelines(average(values, window))
    except rasterio.errors.RasterioError as error:
        raise OSError(f"cannot read it: {error.__cause__ or error}") from None


def read_rows(raster, band, masked, alphas, dtype, top, bottom):
    """Return rows (row, column) of a band, NaN where not valid or not in the raster."""
    values = np.empty((bottom - top, raster.width // 32 * 32 + 48), dtype)
    values = values[:, : raster.width]  # with gaps, as rows 4096 n bytes apart are slow
    first, last = max(top, 0), min(bottom, raster.height)
    values[: first - top] = values[last - top :] = np.nan
    few = 2**20 // raster.width + 1  # rows, so that they stay in the processor's cache
    for y in range(first, last, few):
        part = values[y - top : min(y + few, last) - top]
        box = (y, y + len(part)), (0, raster.width)
        raster.read(band, window=box, out=part)
        if masked:
            part[raster.read_masks(band, window=box) == 0] = np.nan
        for alpha in alphas:  # which GDAL takes for a mask of 1 or 3 bands only
            part[raster.read(alpha, window=box) == 0] = np.nan
    return values


def average(values, window):
    """Return the means of all rows but half a window at each end; changes values."""
    # Down, then across, makes a square. Beyond the left and right edge is NaN.
    weights, halo = np.full(window, 1 / window), window // 2
    convolve1d(values, weights, 0, output=values)
    means = values[halo : len(values) - halo]
    return convolve1d(means, weights, 1, output=means, mode="constant", cval=np.nan)


@contextlib.contextmanager
def new_result(raster, window):
    """Yield the layout of a draft; give the draft its name once it is whole."""
    name = Path(raster.name).stem
    if not os.path.exists(raster.name):  # a variable in a file, or an address
        name = re.sub(r"[^\w.-]+", "_", raster.name).removesuffix(".tif").strip("_")
    target = Path("smooth", f"{name}.tif")
    check_earlier(raster, target)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: clean up
    FOLDER.mkdir(parents=True)
    try:
        layout = lay_out(FOLDER / target.name, raster, window)
    except Exception as error:  # noqa: BLE001
        raise OSError(f"cannot write it, is the disk full? {error}") from None
    yield layout
    check_earlier(raster, target)
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.SIG_IGN)  # the rest takes no time
    for ending in ".aux.xml", ".ovr", ".msk":  # of an earlier result
        Path(f"{target}{ending}").unlink(missing_ok=True)
    for file in sorted(FOLDER.iterdir(), reverse=True):  # the .tif at last
        file.replace(target.with_name(file.name))
    shutil.rmtree(FOLDER, ignore_errors=True)
    text = f"{raster.width} x {raster.height} pixels, window {window} x {window}"
    with contextlib.suppress(OSError, ValueError):  # it is whole, printed or not
        print(f"{target}: {text}", flush=True)


def check_earlier(raster, target):
    """ValueError if the result's name is taken by anything but an earlier result."""
    if target.exists():
        with rasterio.open(target) as earlier:  # a tag loses blanks in front
            of = os.path.realpath(earlier.tags().get("FOCAL_MEAN_OF", ""))
        path, *files = map(os.path.realpath, [raster.name.lstrip(), *raster.files])
        if of != path or os.path.realpath(target) in files:
            raise ValueError(f"it would overwrite {target}: move that elsewhere")


def lay_out(draft, raster, window):
    """Write a draft but for its pixels; return it, where its bands begin, its type."""
    bands, dtype = choose_bands(raster)
    crs = raster.crs or raster.gcps[1] or rasterio.CRS()
    head = "GTiff", *raster.shape[::-1], len(bands), crs, raster.transform, dtype
    kind = {"interleave": "band", "blockysize": 1, "endianness": "NATIVE"}
    stale = "(?i)statistics|nodata|fill|missing|valid_|_range|sample|^(ns|bidx)$"
    with rasterio.open(draft, "w", *head, gcps=raster.gcps[0], **kind) as result:
        for number, n in enumerate([0, *bands]):  # 0 is the raster
            kept = {k: v for k, v in raster.tags(n).items() if not re.search(stale, k)}
            result.update_tags(number, **kept)
        result.update_tags(FOCAL_MEAN_WINDOW=window, FOCAL_MEAN_OF=raster.name)
        result.update_tags(ns="RPC", **raster.tags(ns="RPC"))
        for item in "descriptions", "scales", "offsets", "units":
            setattr(result, item, [getattr(raster, item)[band - 1] for band in bands])
        colors = [raster.colorinterp[band - 1].name for band in bands]
        result.colorinterp = [ColorInterp[c.replace("palette", "gray")] for c in colors]
    with rasterio.open(draft, "r+") as result:  # set before, GDAL would write all rows
        result.nodata = np.nan
    # A full disk fails here, except on macOS, which has no such function.
    with contextlib.suppress(AttributeError), open(draft, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, draft.stat().st_size)
    places, last = {}, raster.height - 1
    with rasterio.open(draft) as result:  # fails if its head is not whole
        for number, band in enumerate(bands, 1):
            keys = "BLOCK_OFFSET_0_0", f"BLOCK_OFFSET_0_{last}"
            begin, end = (int(result.get_tag_item(k, "TIFF", number)) for k in keys)
            if end - begin != last * raster.width * dtype.itemsize:
                raise OSError("GDAL has not laid out its rows one behind the other")
            places[band] = begin
    return draft, places, dtype


def choose_bands(raster):
    """Return the numbers of the bands to blur, and the type of their means."""
    bands = [n for n, c in enumerate(raster.colorinterp, 1) if c.name != "alpha"]
    types = [raster.dtypes[band - 1] for band in bands]
    if not bands or any("complex" in name for name in types):
        names = "  ".join(raster.subdatasets[:4])
        raise ValueError(f"no band of real numbers; in it are: {names or 'no others'}")
    return bands, np.result_type(np.float32, *types)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # they are for programmers
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("raster")
    parser.add_argument("window", type=int, nargs="?", default=15)
    options = parser.parse_args()
    if options.window < 1 or options.window % 2 == 0:
        parser.error("WINDOW must be an odd number of pixels")
    try:
        main(options.raster, options.window)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)  # so that the draft goes whole
        shutil.rmtree(FOLDER, ignore_errors=True)
        reason = " ".join(str(error).split()).removeprefix(f"{options.raster}: ")
        print(f"{options.raster}: {reason or 'stopped'}, no result", file=sys.stderr)
        os._exit(1)  # at once, as other threads may never end
