"""Time the scripts beside a plain copy and the 2-D way; write benchmark.md.

On Linux, as peak memory is read from /proc:

    python tests/benchmark.py [--quick] [--rounds N]

--quick     small rasters, window 15 and one round: shows that the benchmark works,
            and prints the tables instead of writing them to tests/benchmark.md
--rounds N  how often each program is timed; 5 unless given

Whole processes are timed, from start to exit, with the rasters in the page cache. Each
round runs every program once, every other round backwards. Peak memory is that of all
processes of a program together, from a run of its own: RSS counts shared memory once
for each process that has touched it, as many a Slurm does, PSS counts it once, as a
cgroup does. All files are in a temporary folder, on the disk that TMPDIR says: it takes
4 GB and the largest result, 2.3 GB.
"""

import argparse
import contextlib
import glob
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import rasterio
import rasterio.shutil
import scipy
from scipy import ndimage

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.environ["GDAL_CACHEMAX"] = "48"  # MB, for the copy as for the scripts
CPUS = len(os.sched_getaffinity(0))
ONCE = "plain.tif", "2-D", 15  # too slow for every round
NODATA = -9999
ROWS = 512  # at a time
PAGE = """\
Whole processes from start to exit, medians, with the rasters in the page cache. RSS
counts shared memory once for each process that has touched it, PSS once.
"""


def make_raster(path, columns, rows, bands, **profile):
    """Write hills with bumps and measuring noise, rounded to cm, and a sea of nodata."""
    random = np.random.default_rng(1)
    x = np.arange(columns, dtype=np.float32)
    profile = {"dtype": "float32", "nodata": NODATA, "crs": "EPSG:3067"} | profile
    profile |= {"width": columns, "height": rows, "count": bands}
    place = rasterio.Affine(2, 0, 500000, 0, -2, 7000000)
    draft = path.replace(".nc", ".tif")
    with rasterio.open(draft, "w", "GTiff", transform=place, **profile) as raster:
        for top in range(0, rows, ROWS):
            y = np.arange(top, min(top + ROWS, rows), dtype=np.float32)[:, np.newaxis]
            ground = 60 + 50 * np.sin(x / 1700) * np.cos(y / 1100)
            ground += 3 * np.sin((x + y) / 90) + np.sin(x / 17) * np.cos(y / 23)
            ground += 0.05 * random.standard_normal(ground.shape, np.float32)
            ground = np.where(ground < 20, profile["nodata"], ground.round(2))
            values = np.repeat(ground[np.newaxis], bands, 0).astype(profile["dtype"])
            raster.write(values, window=((top, top + len(y)), (0, columns)))
    if path != draft:
        rasterio.shutil.copy(draft, path, driver="netCDF", FORMAT="NC")
        os.remove(draft)


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


def convolve_2d(path, window):
    """Sum window x window products a pixel: the plain way, with the square's kernel."""
    kernel = np.full((window, window), 1 / window**2)
    with rasterio.open(path) as raster, new_result(raster) as result:
        values = raster.read(1)
        values[raster.read_masks(1) == 0] = np.nan
        result.write(ndimage.convolve(values, kernel, mode="constant", cval=np.nan), 1)


PROGRAMS = {"copy": copy, "2-D": convolve_2d}


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


def find_family(pid):
    """Return the numbers of a process and its descendants."""
    family = [pid]
    for member in family:
        for children in glob.glob(f"/proc/{member}/task/*/children"):
            with contextlib.suppress(OSError), open(children) as pids:
                family += map(int, pids.read().split())
    return family


def count_memory(pid):
    """Return the MB, as RSS and as PSS, of a process and its descendants.

    They are stopped meanwhile, as pages would move from one to the next.
    """
    sizes = np.zeros(2)
    family = []
    while set(family) != set(family := find_family(pid)):
        for member in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGSTOP)
    for member in family:
        with contextlib.suppress(OSError), open(f"/proc/{member}/smaps_rollup") as file:
            kilobytes = dict(line.split()[:2] for line in file if "kB" in line)
            sizes += int(kilobytes["Rss:"]), int(kilobytes["Pss:"])
    for member in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGCONT)
    return sizes * 1024 / 1e6


def peak_memory(command, environment, **options):
    """Run a program; return the most MB, as RSS and as PSS, that it took at a time."""
    peak = np.zeros(2)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, **options
    ) as process:
        while process.poll() is None:
            peak = np.maximum(peak, count_memory(process.pid))
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
    others = "stack.tif", "wide.tif", "classic.nc"
    cases += [(raster, name, 15) for raster in others for name in ("simple", multi[-1])]
    cases += [("sheet.tif", "2-D", 15), ONCE]
    return cases


def main(rasters, windows, rounds):
    """Make the rasters, run everything and return the page with the tables."""
    tiles = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate"}
    stack = tiles | {"dtype": "uint16", "nodata": 0, "interleave": "pixel"}
    profiles = {"tiled.tif": tiles, "stack.tif": stack}
    for raster, shape in rasters.items():
        make_raster(raster, *shape, **profiles.get(raster, {}))
    cases = choose_cases(rasters, windows)
    peaks = {case: peak_memory(*prepare(*case)) for case in cases}
    seconds = {case: [] for case in cases}
    for raster in rasters:  # each on its own, as large results slow the disk down
        same = [case for case in cases if case[0] == raster]
        for turn in range(rounds):
            for case in same[:: (-1) ** turn]:
                if turn == 0 or case != ONCE:
                    seconds[case].append(run(*case)[0])
    page = [
        "# Benchmark",
        "",
        "Written by `python tests/benchmark.py`, on this machine:",
    ]
    page += [describe_machine() + ".", ""]
    page += [PAGE]
    page += ["| Raster | Program | Window | Runs | Median | Fastest, slowest "]
    page[-1] += "| README's rule | Times the copy | A pixel | Memory: RSS | PSS |"
    page += ["| --- | --- |" + " ---: |" * 9]
    for (raster, program, window), times in seconds.items():
        columns, rows, bands = rasters[raster]
        pixels = columns * rows * bands
        median = statistics.median(times)
        beside = median / statistics.median(seconds[raster, "copy", 15])
        cells = [f"{raster} {columns} x {rows} x {bands}", program, window, len(times)]
        cells += [f"{median:.2f} s", f"{min(times):.2f}, {max(times):.2f} s"]
        name, _, processes = program.partition(" ")
        rule = 0.5 + pixels / 1e6 * (0.03 + window / 2000) / int(processes or 1)
        cells += [f"{rule:.1f} s" if name in ("simple", "multiprocessing") else ""]
        cells += [f"{beside:.2f}", f"{median / pixels * 1e9:.1f} ns"]
        cells += [f"{size:.0f} MB" for size in peaks[raster, program, window]]
        page += [f"| {' | '.join(map(str, cells))} |"]
    return "\n".join(page) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--run", nargs=3)
    options = parser.parse_args()
    if options.run:
        program, raster, window = options.run
        sys.exit(PROGRAMS[program](raster, int(window)))
    windows, rounds, part = (5, 15, 51), 5, 1
    if options.quick:
        windows, rounds, part = (15,), 1, 8
    rasters = {"plain.tif": (12000, 12000, 1), "tiled.tif": (12000, 12000, 1)}
    rasters |= {"sheet.tif": (3000, 3000, 1), "huge.tif": (24000, 24000, 1)}
    rasters |= {"stack.tif": (10980, 2048, 12), "wide.tif": (16384, 8192, 1)}
    rasters |= {"classic.nc": (6000, 6000, 1)}
    rasters = {k: (c // part, r // part, bands) for k, (c, r, bands) in rasters.items()}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        page = main(rasters, windows, options.rounds or rounds)
    if options.quick:
        print(page)
    else:
        with open(os.path.join(ROOT, "tests", "benchmark.md"), "w") as file:
            file.write(page)
