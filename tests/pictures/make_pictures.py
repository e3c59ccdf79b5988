"""Draw README's pictures from the sample data and from what the scripts make of it.

    python tests/pictures/make_pictures.py [FOLDER]

Writes to the folder of this file unless another one is given. Needs matplotlib.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import rasterio
from matplotlib.colors import LightSource
from matplotlib.patches import Rectangle
from rasterio.merge import merge

ROOT = Path(__file__).resolve().parents[2]
DEM = ROOT / "tests/data/jacksboro.vrt"
PIXEL = 92.6  # metres from south to north: 3 arc-seconds of 1852 / 60 metres
SQUEEZE = np.cos(np.radians(36.6))  # from west to east a pixel is this much shorter


def blur(raster, folder, window=15):
    """Run the simple script in a folder; return the result as an array (row, column)."""
    script = [sys.executable, ROOT / "simple_focal_mean.py", raster, str(window)]
    subprocess.run(script, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with rasterio.open(Path(folder, "smooth", Path(raster).stem + ".tif")) as result:
        return result.read(1)


def frame(axis, left, top, width, height, **style):
    """Draw a rectangle around pixels."""
    axis.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, **style))


def draw_heights(axis, heights, title):
    """Draw an elevation model, lit from the north-west, with a scale bar."""
    # A hole has no height to be lit, so it is drawn in white.
    ground = np.nan_to_num(heights, nan=236)
    pixel = {"dx": PIXEL * SQUEEZE, "dy": PIXEL, "vert_exag": 2}
    colours = {"cmap": mpl.colormaps["gist_earth"], "vmin": 36, "vmax": 1276}
    shaded = LightSource(315, 45).shade(ground, blend_mode="soft", **colours, **pixel)
    shaded[np.isnan(heights)] = 1
    axis.imshow(shaded, aspect=1 / SQUEEZE, interpolation="nearest")
    axis.set(title=title, xticks=[], yticks=[])
    length, bottom = 5000 / (PIXEL * SQUEEZE), heights.shape[0] - 28  # pixels
    frame(axis, 14, bottom - 22, length + 12, 34, color="w", alpha=0.8)
    axis.plot([20, 20 + length], [bottom, bottom], color="k", linewidth=3)
    axis.text(20 + length / 2, bottom - 6, "5 km", ha="center")


def draw_results(folder):
    """Draw the elevation model beside its focal mean, and that of its four sheets."""
    with tempfile.TemporaryDirectory() as scratch:
        before, after = rasterio.open(DEM).read(1).astype(float), blur(DEM, scratch)
        for sheet in DEM.parent.glob("*_*.tif"):
            blur(sheet, scratch)
        sheets = merge(list(Path(scratch, "smooth").glob("*_*.tif")))[0][0]
    blurred = [after, "after: mean of 15 x 15 pixels"], [after, "seamless"]
    pairs = [[before, "before"], [sheets, "four sheets one by one"]]
    for name, left, right in zip(
        ["before_and_after", "sheets_that_touch"], pairs, blurred
    ):
        figure, axes = plt.subplots(1, 2, figsize=(9, 5.2), layout="constrained")
        draw_heights(axes[0], *left)
        draw_heights(axes[1], *right)
        figure.savefig(Path(folder, f"{name}.png"), dpi=100)


def draw_rules(folder):
    """Draw which pixels become nodata, and how chunks and halos lie in a raster."""
    size, window, chunk = 24, 5, 8
    half = window // 2
    heights = np.ones((size, size), np.float32)
    heights[8, 16] = np.nan
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "small.tif")
        with rasterio.open(
            path, "w", "GTiff", size, size, 1, dtype="float32"
        ) as raster:
            raster.write(heights, 1)
        kinds = np.isnan(blur(path, scratch, window)) + 1.0 * np.isnan(heights)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
    left.imshow(kinds, cmap=mpl.colors.ListedColormap(["#9ecae1", "w", "#d62728"]))
    left.set_title(f"nodata (white) for a window of {window} x {window}")
    frame(left, 0, 0, size, size, fill=False, edgecolor="k")
    for column, row, colour in [(11, 13, "k"), (16, 8, "#d62728"), (0, 20, "0.5")]:
        place = column - half, row - half, window, window
        frame(left, *place, fill=False, color=colour, linewidth=2)
        left.plot(column, row, "o", color=colour, markersize=4)
    right.imshow(np.zeros((size, size)), cmap="Greys", vmax=1)
    right.set_title("a worker reads its chunk and the halo")
    middle = {"ha": "center", "va": "center"}
    for number, colour in enumerate(["w", "#9ecae1", "w"]):
        top = number * chunk
        frame(right, 0, top, size, chunk, facecolor=colour, edgecolor="k")
        right.text(size / 2, top + chunk / 2 - 0.5, f"chunk {number}", **middle)
    for top in (chunk - half, 2 * chunk):
        frame(right, 0, top, size, half, color="#fdae6b", alpha=0.8)
        right.text(size / 2, top + half / 2 - 0.5, "halo of chunk 1", **middle)
    for axis in (left, right):
        axis.set(xlim=(-3, size + 2), ylim=(size + 2, -3), aspect="equal")
        axis.set_axis_off()
    figure.savefig(Path(folder, "nodata_and_halo.png"), dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent
    draw_results(chosen)
    draw_rules(chosen)
