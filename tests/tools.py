"""What several tests need: starting the scripts, writing rasters, the reference."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import rasterio

ROOT = Path(__file__).resolve().parent.parent
SIMPLE = ROOT / "simple_focal_mean.py"
MULTI = ROOT / "multiprocessing_focal_mean.py"
SCRIPTS = [SIMPLE, MULTI]


def run(script, *arguments, cwd, **environment):
    """Run a script in folder cwd with more environment variables; return how it ended."""
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"SLURM_CPUS_PER_TASK": "2"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def blur(script, raster, window=15, *, cwd, **environment):
    """Run a script that must end well and without a word of error; return the result's path."""
    done = run(script, raster, window, cwd=cwd, **environment)
    assert (done.returncode, done.stderr) == (0, ""), done
    return Path(cwd, done.stdout.splitlines()[-1].split(": ")[0])


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


def brute_force(bands, valid, window):
    """Return the focal mean in float64, each window summed by itself; NaN where it is nodata."""
    half = window // 2
    values = np.where(valid, np.asarray(bands, np.float64), np.nan)
    padded = np.pad(
        values, ((0, 0), (half, half), (half, half)), constant_values=np.nan
    )
    windows = np.lib.stride_tricks.sliding_window_view(padded, (window, window), (1, 2))
    return windows.mean(axis=(3, 4))


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
