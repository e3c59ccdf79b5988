"""Time the scripts on rasters of many shapes, beside a plain copy and the 2-D way.

On Linux, as processor seconds and memory are read from /proc:

    python tests/benchmark.py [--quick] [--rounds N] [--beside FOLDER] [RASTER ...]

RASTER ...  only these of the table, such as plain.tif
--quick     an eighth of their columns and rows, window 15 and one round: shows that
            the benchmark works
--rounds N  how often each program is timed; 3 unless given
--beside FOLDER  the scripts in that folder are timed, too, in the same rounds

tests/benchmark.md is what it prints with --rounds 2 sheet.tif stack.tif plain.tif.

Whole processes are timed, from start to exit, with the raster in the page cache. Each
round runs every program once, every other round backwards. Processor seconds include
the workers', also of scripts that do not wait for them. Peak memory is that of all
processes of a program together, from a run of its own: RSS counts shared memory once
for each process that has touched it, as many a Slurm does, PSS counts it once, as a
cgroup does. A raster and its result at a time lie in a temporary folder, on the disk
that TMPDIR says: 2 GB for the largest.
"""

import argparse
import contextlib
import ctypes
import glob
import os
import platform
import resource
import shutil
import signal
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
os.environ["GDAL_CACHEMAX"] = "48"  # MB, for the copy; the scripts set their own
CPUS = len(os.sched_getaffinity(0))
ROWS = 512  # at a time
PAGE = """\
Whole processes from start to exit, with the rasters in the page cache: the fastest of
so many runs, in seconds, then the fewest seconds of the processors, which include the
workers', and those of the main process alone; the processors' nanoseconds for each
pixel and band. RSS counts shared memory once for each process that has touched it, PSS
once. Behind "multiprocessing" is the number of processes.
"""


def tiles(size, **profile):
    """Return the profile of a GeoTIFF in compressed tiles of size x size pixels."""
    tiled = {"tiled": True, "blockxsize": size, "blockysize": size}
    return tiled | {"compress": "deflate"} | profile


INTEGERS = {"dtype": "uint16", "nodata": 0}
STACK = INTEGERS | {"interleave": "pixel"}
RASTERS = {  # columns, rows, bands and profile
    "plain.tif": (12000, 12000, 1, {}),
    "tiled.tif": (12000, 12000, 1, tiles(512)),
    "sheet.tif": (3000, 3000, 1, {}),
    "classic.nc": (6000, 6000, 1, {}),
    "picture.png": (5000, 5000, 1, INTEGERS),
    "stack.tif": (10980, 2048, 12, tiles(512, **STACK)),
    "layers.tif": (8192, 2048, 12, tiles(256, **INTEGERS, interleave="band")),
    "large_tiles.tif": (16384, 8192, 1, tiles(4096)),
    "four_1024.tif": (8192, 4096, 4, tiles(1024, **STACK)),
    "four_512.tif": (8192, 4096, 4, tiles(512, **STACK)),
    "hundred.tif": (1000, 1000, 100, tiles(256, **STACK)),
}
# As many values with 4, 60 and 242 bands, in tiles that hold all bands.
for bands, size in (4, 7872), (60, 2032), (242, 1012):
    RASTERS[f"bands_{bands}.tif"] = size, size, bands, tiles(256, **STACK)
for columns in 4096, 8192, 16384:
    for width in columns, columns + 12:
        RASTERS[f"width_{width}.tif"] = width, 6000, 1, {}
for width in 8192, 8204:
    RASTERS[f"doubles_{width}.tif"] = width, 6000, 1, {"dtype": "float64"}


def make_raster(path, columns, rows, bands, profile):
    """Write hills with bumps and measuring noise, rounded to cm, and a sea of nodata."""
    random = np.random.default_rng(1)
    x = np.arange(columns, dtype=np.float32)
    profile = {"dtype": "float32", "nodata": -9999, "crs": "EPSG:3067"} | profile
    profile |= {"width": columns, "height": rows, "count": bands}
    place = rasterio.Affine(2, 0, 500000, 0, -2, 7000000)
    name, ending = os.path.splitext(path)
    draft = f"{name}.tif"
    with rasterio.open(draft, "w", "GTiff", transform=place, **profile) as raster:
        for top in range(0, rows, ROWS):
            y = np.arange(top, min(top + ROWS, rows), dtype=np.float32)[:, np.newaxis]
            ground = 60 + 50 * np.sin(x / 1700) * np.cos(y / 1100)
            ground += 3 * np.sin((x + y) / 90) + np.sin(x / 17) * np.cos(y / 23)
            ground += 0.05 * random.standard_normal(ground.shape, np.float32)
            ground = np.where(ground < 20, profile["nodata"], ground.round(2))
            values = np.repeat(ground[np.newaxis], bands, 0).astype(profile["dtype"])
            raster.write(values, window=((top, top + len(y)), (0, columns)))
    if ending == ".nc":
        rasterio.shutil.copy(draft, path, driver="netCDF", FORMAT="NC")
    if ending == ".png":
        rasterio.shutil.copy(draft, path, driver="PNG")


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


def prepare(raster, program, window, folder=ROOT):
    """Clear the disk; return the command that runs a program and its environment."""
    shutil.rmtree("smooth", ignore_errors=True)
    os.mkdir("smooth")
    os.sync()  # so that the disk has finished with the result of the last run
    name, _, processes = program.partition(" ")
    script = [os.path.join(folder, f"{name}_focal_mean.py")]
    if name in PROGRAMS:
        script = [os.path.abspath(__file__), "--run", name]
    environment = os.environ | {"SLURM_CPUS_PER_TASK": processes}
    return [sys.executable, *script, raster, str(window)], environment


def run(*case):
    """Run a program; return its seconds, its processors' and its main process's."""
    command, environment = prepare(*case)
    wait_for_all()
    earlier = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL
    ) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        seconds = time.perf_counter() - began
        with open(f"/proc/{process.pid}/stat") as file:  # still there, as not reaped
            ticks = file.read().rpartition(")")[2].split()[11:13]
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    wait_for_all()
    later = resource.getrusage(resource.RUSAGE_CHILDREN)
    processors = later.ru_utime + later.ru_stime - earlier.ru_utime - earlier.ru_stime
    return seconds, processors, sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def wait_for_all():
    """Wait until all processes have ended that were started, and their workers."""
    with contextlib.suppress(ChildProcessError):
        while os.wait():
            pass


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


def choose_cases(raster, folders, quick):
    """Return what to run on a raster: a program, a window and the scripts' folder."""
    windows, copies = {"plain.tif": (5, 15, 51), "sheet.tif": (5, 15, 51)}, []
    programs = ["simple", "multiprocessing 2"]
    if raster.startswith(("width", "doubles")):
        windows[raster] = 5, 15
    elif not raster.startswith("bands"):
        copies = ["copy", "2-D"] if raster == "sheet.tif" else ["copy"]
    cases = [(name, 15, ROOT) for name in copies]
    if raster in ("plain.tif", "tiled.tif"):
        programs.insert(1, "multiprocessing 1")
    several = [15] if quick else windows.get(raster, [15])
    cases += [(name, w, f) for name in programs for w in several for f in folders]
    if raster in ("plain.tif", "tiled.tif"):  # does it scale?
        more = [f"multiprocessing {number}" for number in (4, 8, 16)]
        cases += [(name, 15, f) for name in more for f in folders]
    return cases


def measure(raster, shape, cases, rounds):
    """Make a raster, run its cases and return the rows of the table."""
    columns, rows, bands, _ = shape
    make_raster(raster, *shape)
    peaks = {case: peak_memory(*prepare(raster, *case)) for case in cases}
    times = {case: [] for case in cases}
    for turn in range(rounds):
        for case in cases[:: (-1) ** turn]:
            times[case].append(run(raster, *case))
    for path in glob.glob(f"{raster.partition('.')[0]}.*"):
        os.remove(path)
    page = []
    for (program, window, folder), runs in times.items():
        seconds, processors, main = np.min(runs, 0)
        pixels = columns * rows * bands
        name, _, number = program.partition(" ")
        processes = int(number or 1)
        rule = 0.5 + pixels / 1e6 * (0.03 + window / 2000) / processes
        cells = [f"{raster} {columns} x {rows} x {bands}", program, window]
        cells[1] += "" if folder == ROOT else f" in {folder}"
        cells += [len(runs), f"{seconds:.2f}"]
        cells += [f"{rule:.1f}" if name not in PROGRAMS and processes <= CPUS else ""]
        cells += [f"{processors:.2f}", f"{main:.2f}"]
        cells += [f"{processors / pixels * 1e9:.0f}"]
        cells += [f"{size:.0f} MB" for size in peaks[program, window, folder]]
        page += [f"| {' | '.join(map(str, cells))} |"]
    return page


def main(names, folders, rounds, quick):
    """Measure on the rasters of these names and return the page with the table."""
    page = [
        "# Benchmark",
        "",
        "Printed by `python tests/benchmark.py`, on this machine:",
    ]
    page += [describe_machine() + ".", "", PAGE]
    page += ["| Raster | Program | Window | Runs | Seconds | README's rule "]
    page[-1] += "| Processors | Main process | A value | RSS | PSS |"
    page += ["| --- | --- |" + " ---: |" * 9]
    for raster in names:
        columns, rows, bands, profile = RASTERS[raster]
        part = 8 if quick else 1
        shape = columns // part, rows // part, bands, profile
        page += measure(raster, shape, choose_cases(raster, folders, quick), rounds)
    return "\n".join(page)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("rasters", nargs="*", metavar="RASTER", default=list(RASTERS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--beside", type=os.path.abspath)
    parser.add_argument("--run")
    options = parser.parse_args()
    if options.run:
        raster, window = options.rasters
        sys.exit(PROGRAMS[options.run](raster, int(window)))
    folders = [ROOT, *filter(None, [options.beside])]
    rounds = options.rounds or (1 if options.quick else 3)
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: parent of orphaned workers
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        print(main(options.rasters, folders, rounds, options.quick))
