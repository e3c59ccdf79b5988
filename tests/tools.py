"""What several tests need: starting the scripts, writing rasters, the reference."""

import contextlib
import itertools
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
from scipy.io import netcdf_file

ROOT = Path(__file__).resolve().parent.parent
SIMPLE = ROOT / "simple_focal_mean.py"
MULTI = ROOT / "multiprocessing_focal_mean.py"
SCRIPTS = [SIMPLE, MULTI]
LIMIT = 120  # seconds after which whatever a test waits for counts as hanging

# Users without root's rights who can read all the same, as Python may be in /root. A
# new one for each run, as a limit counts all processes of a user.
NOBODY = ["setpriv", "--clear-groups"]
NOBODY += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
USERS = (10_000 + (os.getpid() * 16 + i) % 50_000 for i in itertools.count())

# Names that a shell, a format or a parser could take for something else.
NAMES = [
    'it\'s  "$(touch executed)" `touch executed`; touch executed & *.tif',
    "back\\slash\\n %d {0} #1 äöå ☃.tif",
    "-dash.tif",
    "--help.tif",
    ".hidden.tif",
    "no ending",
]


def blur(script, raster, window=15, *, cwd):
    """Run a script that must end well and without a word of error; return the result's path."""
    done = subprocess.run(
        [sys.executable, script, raster, str(window)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    check_silent(done)
    return Path(cwd, done.stdout.splitlines()[-1].split(": ")[0])


def run_as_nobody(script, raster, *, cwd, processes=1000, **environment):
    """Run a script without root's rights, with at most so many processes."""
    command = [sys.executable, script, raster]
    if os.geteuid() == 0:
        user = next(USERS)
        command = [*NOBODY, f"--reuid={user}", f"--regid={user}", *command]
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"SLURM_CPUS_PER_TASK": "2"} | environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NPROC, (processes,) * 2),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def check_failed(done, raster, *words):
    """Check that the last line of a failed run names the raster and a reason with words."""
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr, done
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"{raster}: ") and line != f"{raster}: ", done
    assert all(word in line for word in words), line


def check_silent(done):
    """Check that a run has ended well and without a word of error."""
    assert (done.returncode, done.stderr) == (0, ""), done


def files(folder):
    """Return what is in a folder, hidden files too, and below it."""
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def read(path):
    """Return the values (band, row, column) of a raster."""
    with rasterio.open(path) as raster:
        return raster.read()


def damage_end(path):
    """Cut off the second half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def write_raster(path, bands, **profile):
    """Write an array (band, row, column) as a GeoTIFF in Finnish coordinates; return its path."""
    bands = np.asarray(bands)
    profile = {
        "driver": "GTiff",
        "crs": "EPSG:3067",
        "transform": rasterio.Affine(2, 0, 500000, 0, -2, 7000000),
        "count": bands.shape[0],
        "height": bands.shape[1],
        "width": bands.shape[2],
        "dtype": bands.dtype,
    } | profile
    with rasterio.open(path, "w", **profile) as raster:
        raster.write(bands)
    return path


def write_earlier(target, raster):
    """Write what is known as an earlier result of a raster; return its bytes."""
    with rasterio.open(write_raster(target, np.ones((1, 9, 9))), "r+") as result:
        result.update_tags(FOCAL_MEAN_OF=raster, FOCAL_MEAN_WINDOW="9 x 9")
    return target.read_bytes()


def write_netcdf(path, version=1, shape=(40, 50), names=("red", "nir")):
    """Write a classic netCDF (1) or one with 64-bit offsets (2); return its path."""
    with netcdf_file(path, "w", version=version) as file:
        file.createDimension("y", shape[0])
        file.createDimension("x", shape[1])
        for number, name in enumerate(names):
            variable = file.createVariable(name, "f", ("y", "x"))
            variable[:] = np.arange(np.prod(shape)).reshape(shape) % 997 + number
            variable.valid_range = np.array([0, 2000], "f")
            variable.long_name = f"the {name} band"
    return path


def write_vrt(path, *sources, extra=">"):
    """Write a virtual raster of 50 x 40 pixels, its sources one below the other."""
    rows = 40 // len(sources)
    sources = "".join(
        f"""<SimpleSource><SourceFilename>{source}</SourceFilename>
        <SourceBand>1</SourceBand><SrcRect xOff="0" yOff="0" xSize="50" ySize="{rows}"/>
        <DstRect xOff="0" yOff="{top}" xSize="50" ySize="{rows}"/></SimpleSource>"""
        for top, source in zip(range(0, 40, rows), sources)
    )
    path.write_text(
        f"""<VRTDataset rasterXSize="50" rasterYSize="40"><VRTRasterBand
        dataType="Float32" band="1"{extra}{sources}</VRTRasterBand></VRTDataset>"""
    )
    return path


def write_zeros(path, width, height, bands=1, **profile):
    """Write a GeoTIFF of zeros without a block, or with all where it is compressed."""
    profile = {"dtype": "float32"} | profile
    profile |= {"width": width, "height": height, "count": bands}
    profile |= {"transform": rasterio.Affine.scale(2), "nodata": -9999}
    sparse = "compress" not in profile
    with rasterio.open(path, "w", "GTiff", SPARSE_OK=sparse, **profile):
        return path


def brute_force(bands, valid, window):
    """Return the focal mean in float64, each window summed by itself; NaN where it is nodata."""
    half = window // 2
    values = np.where(valid, np.asarray(bands, np.float64), np.nan)
    padded = np.pad(
        values, ((0, 0), (half, half), (half, half)), constant_values=np.nan
    )
    windows = np.lib.stride_tricks.sliding_window_view(padded, (window, window), (1, 2))
    return windows.mean(axis=(3, 4))


def need(*programs, path=None):
    """Skip a test, but not in CI, where one of the programs is missing."""
    path = f"{path or os.environ['PATH']}:/usr/sbin"  # where the daemons are
    missing = [name for name in programs if not shutil.which(name, path=path)]
    if missing and "CI" not in os.environ:
        pytest.skip(f"not installed: {', '.join(missing)}")


def sees_memory(cluster):
    """Tell whether this Slurm sees what memory a job takes: 25.11 with a new glibc does not."""
    version = subprocess.check_output(["sinfo", "--version"], env=cluster, text=True)
    glibc = tuple(map(int, platform.libc_ver()[1].split(".")))
    return " 25.11" not in version or glibc < (2, 43)


def copy_tracked(folder):
    """Copy what git tracks of this repository to a folder; return the folder."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, names.split("\0")):
        target = Path(folder, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    return Path(folder)


def processes(*variables):
    """Return the folders in /proc of the processes that were started with variables."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            text = environment.read_bytes().decode(errors="replace")
        except OSError:  # it has ended, or is somebody else's
            continue
        if all(variable in text for variable in variables):
            found.append(environment.parent)
    return found


def find_members(session):
    """Return the processes of a session that are at work."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, number = stat.read_text().rpartition(") ")[2].split()[:4]
            if int(number) == session and state not in "ZX":
                members.append(int(stat.parent.name))
    return members


def wait_until(condition):
    """Wait until a function returns something true, and return that."""
    end = time.monotonic() + LIMIT
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.03)
    return value
