"""Time the scripts beside a plain copy, the 2-D way and peers; print Markdown tables.

On Linux, as peak memory is read from /proc:

    python tests/benchmark.py [--quick] [--rounds N]

--quick     small rasters, window 15 and one round: shows that the benchmark works
--rounds N  how often each program is timed; 5 unless given

Whole processes are timed, from start to exit, with the rasters in the page cache. Each
round runs every program once, every other round backwards. Peak memory is that of all
processes of a program together, from a run of its own. All files are in a temporary
folder, on the disk that TMPDIR says: it takes 4 GB and the largest result, 2.3 GB.
"""

import argparse
import glob
import importlib.util
import itertools
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import rasterio
import scipy
from scipy import ndimage

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from multiprocessing_focal_mean import average, read_rows, split_rows

CPUS = len(os.sched_getaffinity(0))
ONCE = "plain.tif", "2-D", 15  # too slow for every round
PEERS = {"OpenCV": "cv2", "dask": "dask"}  # and the modules they need
NODATA = -9999
ROWS = 512  # at a time


def make_raster(path, size, **profile):
    """Write hills with bumps and measuring noise, rounded to cm, and a sea of nodata."""
    random = np.random.default_rng(1)
    x = np.arange(size, dtype=np.float32)
    profile |= {"driver": "GTiff", "width": size, "height": size, "count": 1}
    profile |= {"dtype": "float32", "nodata": NODATA, "crs": "EPSG:3067"}
    place = rasterio.Affine(2, 0, 500000, 0, -2, 7000000)
    with rasterio.open(path, "w", transform=place, **profile) as raster:
        for top in range(0, size, ROWS):
            y = x[top : top + ROWS, np.newaxis]
            ground = 60 + 50 * np.sin(x / 1700) * np.cos(y / 1100)
            ground += 3 * np.sin((x + y) / 90) + np.sin(x / 17) * np.cos(y / 23)
            ground += 0.05 * random.standard_normal(ground.shape, np.float32)
            ground = np.where(ground < 20, NODATA, ground.round(2))
            raster.write(ground, 1, window=((top, top + len(y)), (0, size)))


def copy(path, window):
    """Read and write all rows: what any program must do at least."""
    with rasterio.open(path) as raster, new_result(raster) as result:
        for top in range(0, raster.height, ROWS):
            rows = (top, min(top + ROWS, raster.height)), (0, raster.width)
            result.write(raster.read(window=rows), window=rows)


def new_result(raster):
    """Open an uncompressed GeoTIFF for writing, in the place of the raster."""
    names = "width", "height", "count", "crs", "transform", "nodata"
    profile = {name: getattr(raster, name) for name in names}
    return rasterio.open("smooth/result.tif", "w", dtype=raster.dtypes[0], **profile)


def on_whole_array(blur):
    """Return a program that reads a raster at once, blurs it and writes the result."""

    def program(path, window):
        with rasterio.open(path) as raster, new_result(raster) as result:
            values = raster.read(1)
            values[raster.read_masks(1) == 0] = np.nan
            result.write(blur(values, window), 1)

    return program


def convolve_2d(values, window):
    """Sum window x window products a pixel: the plain way, with the square's kernel."""
    kernel = np.full((window, window), 1 / window**2)
    return ndimage.convolve(values, kernel, mode="constant", cval=np.nan)


def blur_opencv(values, window):
    """Keep running sums, which NaN stays in: so it gets the sea wrong, but is fast."""
    import cv2

    return cv2.blur(values, (window, window))


def blur_dask(values, window):
    """Blur with the scripts' arithmetic in the threads of dask."""
    import dask.array

    def blur(block):
        means = np.empty_like(block)
        average(block, window, 0, output=means)
        average(means, window, 1, output=means)
        return means

    blocks = dask.array.from_array(values, chunks=(ROWS, -1))
    return blocks.map_overlap(blur, depth=(window // 2, 0), boundary=np.nan).compute()


def cost(path, window):
    """Print the ns a pixel of a worker and of the process that writes, both alone."""
    working = writing = 0
    with rasterio.open(path) as raster, new_result(raster) as result:
        dtype = np.dtype(raster.dtypes[0])
        edges = split_rows(raster, [1], dtype, window, 1)
        means = np.zeros((1, edges[1], raster.width), dtype)
        for start, stop in itertools.pairwise(edges):
            began = time.perf_counter()
            top, bottom = start - window // 2, stop + window // 2
            top, bottom = max(top, 0), min(bottom, raster.height)
            values = read_rows(raster, [1], dtype, top, bottom)
            average(values, window, 1, output=values)
            slot = means[:, : stop - start]
            average(values[:, start - top : stop - top], window, 2, output=slot)
            worked = time.perf_counter()
            result.write(slot, window=((start, stop), (0, raster.width)))
            working += worked - began
            writing += time.perf_counter() - worked
        pixels = raster.width * raster.height
    print(working / pixels * 1e9, writing / pixels * 1e9)


PROGRAMS = {"copy": copy, "2-D": on_whole_array(convolve_2d), "cost": cost}
PROGRAMS |= {"OpenCV": on_whole_array(blur_opencv), "dask": on_whole_array(blur_dask)}


def prepare(raster, program, window):
    """Clear the disk; return the command that runs a program and its environment."""
    shutil.rmtree("smooth", ignore_errors=True)
    os.mkdir("smooth")
    os.sync()  # so that the disk has finished with the result of the last run
    name, _, processes = program.partition(" ")
    script = [os.path.join(ROOT, f"{name}_focal_mean.py")]
    if name in PROGRAMS:
        script = [os.path.abspath(__file__), "--run", name]
    environment = os.environ | {"SLURM_CPUS_PER_TASK": processes}
    return [sys.executable, *script, raster, str(window)], environment


def run(*case):
    """Run a program; return the seconds it took and what it printed."""
    command, environment = prepare(*case)
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return time.perf_counter() - began, done.stdout


def count_memory(family):
    """Return the MB of processes and their descendants, counting shared memory once.

    It is their PSS, but with whole libraries, which other programs may share as well.
    """
    own, libraries = 0, [0]
    for pid in family:
        try:
            with open(f"/proc/{pid}/smaps_rollup") as rollup:
                sizes = dict(line.split()[:2] for line in rollup if "kB" in line)
            with open(f"/proc/{pid}/status") as status:
                sizes |= dict(line.split()[:2] for line in status if "kB" in line)
            own += int(sizes["Pss_Anon:"]) + int(sizes["Pss_Shmem:"])
            libraries.append(int(sizes["RssFile:"]))
            for children in glob.glob(f"/proc/{pid}/task/*/children"):
                with open(children) as pids:
                    family += pids.read().split()
        except (OSError, KeyError):
            pass  # it has ended
    return (own + max(libraries)) * 1024 / 1e6


def peak_memory(command, environment, **options):
    """Run a program and return the most MB that it and its descendants took."""
    peak = 0
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, **options
    ) as process:
        while process.poll() is None:
            peak = max(peak, count_memory([process.pid]))
            time.sleep(0.02)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak


def describe_machine():
    """Return the machine and the versions of what matters in a line."""
    with open("/proc/cpuinfo") as cpus:
        model = next((line for line in cpus if "model name" in line), ": CPU unknown")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    modules = rasterio, np, scipy
    modules = [f"{module.__name__} {module.__version__}" for module in modules]
    return (
        f"{model.split(': ')[1].strip()}, {CPUS} CPUs, {memory:.0f} GB memory, "
        f"{platform.platform()}, Python {platform.python_version()}, "
        f"GDAL {rasterio.__gdal_version__}, {', '.join(modules)}"
    )


def choose_cases(rasters, windows):
    """Return what to run: a raster, a program and a window each."""
    multi = [f"multiprocessing {processes}" for processes in range(1, CPUS + 1)]
    cases = [(raster, "copy", 15) for raster in rasters]
    cases += [("plain.tif", name, w) for w in windows for name in ["simple", *multi]]
    cases += [("tiled.tif", name, 15) for name in ["simple", *multi]]
    cases += [("sheet.tif", "simple", window) for window in windows]
    cases += [("huge.tif", multi[-1], 15)]
    cases += [("sheet.tif", "2-D", 15), ONCE]
    for name, module in PEERS.items():
        if importlib.util.find_spec(module):
            cases += [("plain.tif", name, 15)]
        else:
            print(f"{name} is not in the table, as it is not installed.\n")
    return cases


def main(rasters, windows, rounds):
    """Make the rasters, run everything and print the tables."""
    tiles = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate"}
    for raster, side in rasters.items():
        make_raster(raster, side, **(tiles if raster == "tiled.tif" else {}))
    cases = choose_cases(rasters, windows)
    peaks = {case: peak_memory(*prepare(*case)) for case in cases}
    seconds = {case: [] for case in cases}
    costs = {window: [] for window in windows}
    for turn in range(rounds):
        for case in cases[:: (-1) ** turn]:
            if turn == 0 or case != ONCE:
                seconds[case].append(run(*case)[0])
        for window in windows:
            printed = run("plain.tif", "cost", window)[1]
            costs[window].append([float(word) for word in printed.split()])
    print(describe_machine(), end="\n\n")
    print("| Raster | Program | Window | Runs | Median | Fastest, slowest ", end="")
    print("| Times the copy | A pixel | Peak memory |")
    print("| --- | --- |", " | ".join(["---:"] * 7), "|")
    for (raster, program, window), times in seconds.items():
        side = rasters[raster]
        median = statistics.median(times)
        beside = median / statistics.median(seconds[raster, "copy", 15])
        cells = [f"{raster} {side} x {side}", program, window, len(times)]
        cells += [f"{median:.2f} s", f"{min(times):.2f}, {max(times):.2f} s"]
        cells += [f"{beside:.2f}", f"{median / side**2 * 1e9:.1f} ns"]
        cells += [f"{peaks[raster, program, window]:.0f} MB"]
        print("|", " | ".join(map(str, cells)), "|")
    print("\n| Window | A worker's time a pixel | The writer's | Workers to a writer |")
    print("| ---: | ---: | ---: | ---: |")
    for window, pairs in costs.items():
        work, write = map(statistics.median, zip(*pairs))
        print(f"| {window} | {work:.1f} ns | {write:.1f} ns | {work / write:.1f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--run", nargs=3)
    options = parser.parse_args()
    if options.run:
        program, raster, window = options.run
        sys.exit(PROGRAMS[program](raster, int(window)))
    sizes, windows, rounds = (12000, 12000, 3000, 24000), (5, 15, 51), 5
    if options.quick:
        sizes, windows, rounds = (1500, 1500, 600, 3000), (15,), 1
    rasters = dict(zip(["plain.tif", "tiled.tif", "sheet.tif", "huge.tif"], sizes))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main(rasters, windows, options.rounds or rounds)
