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

mpl.use("Agg")
ROOT = Path(__file__).resolve().parents[2]
DEM = ROOT / "tests/data/jacksboro.vrt"
PIXEL = 92.6  # metres from south to north: 3 arc-seconds of 1852 / 60 metres
HEIGHTS = 236, 1076  # metres, the lowest and the highest
SQUEEZE = np.cos(np.radians(36.6))  # from west to east a pixel is this much shorter


def blur(raster, folder):
    """Run the simple script in a folder; return the result as an array (row, column)."""
    script = [sys.executable, ROOT / "simple_focal_mean.py", raster]
    subprocess.run(script, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with rasterio.open(Path(folder, "smooth", Path(raster).stem + ".tif")) as result:
        return result.read(1)


def draw_heights(axis, heights, title):
    """Draw an elevation model, lit from the north-west, with a scale bar."""
    # A hole has no height to be lit, so it is drawn in white.
    shaded = LightSource(azdeg=315, altdeg=45).shade(
        np.nan_to_num(heights, nan=np.nanmin(heights)),
        mpl.colormaps["gist_earth"],
        vmin=HEIGHTS[0] - 200,
        vmax=HEIGHTS[1] + 200,
        blend_mode="soft",
        vert_exag=2,
        dx=PIXEL * SQUEEZE,
        dy=PIXEL,
    )
    shaded[np.isnan(heights)] = 1
    axis.imshow(shaded, aspect=1 / SQUEEZE, interpolation="nearest")
    axis.set_title(title)
    axis.set_xticks([])
    axis.set_yticks([])
    length = 5000 / (PIXEL * SQUEEZE)  # pixels
    left, bottom = 20, heights.shape[0] - 28
    axis.add_patch(
        Rectangle((left - 6, bottom - 22), length + 12, 34, color="w", alpha=0.8)
    )
    axis.plot([left, left + length], [bottom, bottom], color="k", linewidth=3)
    axis.text(left + length / 2, bottom - 6, "5 km", ha="center")


def draw_results(folder):
    """Draw the elevation model beside its focal mean, and that of its four sheets."""
    with rasterio.open(DEM) as raster:
        before = raster.read(1).astype(float)
    with tempfile.TemporaryDirectory() as scratch:
        after = blur(DEM, scratch)
        sheets = np.full(after.shape, np.nan)
        for path in sorted(DEM.parent.glob("*.tif")):
            with rasterio.open(path) as sheet, rasterio.open(DEM) as raster:
                top, left = map(int, raster.index(*sheet.xy(0, 0)))
            means = blur(path, scratch)
            rows, columns = means.shape
            sheets[top : top + rows, left : left + columns] = means
    for name, *pictures in (
        ("before_and_after", before, "before", after, "after: mean of 15 x 15 pixels"),
        ("sheets_that_touch", sheets, "four sheets one by one", after, "seamless"),
    ):
        figure, axes = plt.subplots(1, 2, figsize=(9, 5.2), layout="constrained")
        draw_heights(axes[0], *pictures[:2])
        draw_heights(axes[1], *pictures[2:])
        figure.savefig(Path(folder, f"{name}.png"), dpi=100)


def draw_rules(folder):
    """Draw which pixels become nodata, and how chunks and halos lie in a raster."""
    size, window, chunk = 24, 5, 8
    half = window // 2
    heights = np.ones((1, size, size), np.float32)
    heights[0, 8, 16] = np.nan
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "small.tif")
        profile = {"count": 1, "width": size, "height": size, "dtype": "float32"}
        transform = rasterio.transform.from_origin(9, 9, 1, 1)
        with rasterio.open(path, "w", transform=transform, **profile) as raster:
            raster.write(heights)
        script = [sys.executable, ROOT / "simple_focal_mean.py", path, str(window)]
        subprocess.run(script, cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        with rasterio.open(Path(scratch, "smooth/small.tif")) as result:
            nodata = np.isnan(result.read(1))
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
    kinds = nodata + 1.0 * np.isnan(heights[0])
    axes[0].imshow(kinds, cmap=mpl.colors.ListedColormap(["#9ecae1", "w", "#d62728"]))
    edge = Rectangle((-0.5, -0.5), size, size, fill=False, edgecolor="k")
    axes[0].add_patch(edge)
    axes[0].set_title(f"nodata (white) for a window of {window} x {window}")
    for column, row, colour in [(11, 13, "k"), (16, 8, "#d62728"), (0, 20, "0.5")]:
        corner = (column - half - 0.5, row - half - 0.5)
        axes[0].add_patch(
            Rectangle(corner, window, window, fill=False, color=colour, linewidth=2)
        )
        axes[0].plot(column, row, "o", color=colour, markersize=4)
    axes[1].imshow(np.zeros((size, size)), cmap="Greys", vmax=1)
    for number, top in enumerate([0, chunk, 2 * chunk]):
        bottom = (number + 1) * chunk
        axes[1].add_patch(
            Rectangle(
                (-0.5, top - 0.5),
                size,
                bottom - top,
                facecolor="#9ecae1" if number == 1 else "w",
                edgecolor="k",
            )
        )
        middle = (top + bottom) / 2 - 0.5
        axes[1].text(size / 2, middle, f"chunk {number}", ha="center", va="center")
    for top in (chunk - half, 2 * chunk):
        axes[1].add_patch(
            Rectangle((-0.5, top - 0.5), size, half, color="#fdae6b", alpha=0.8)
        )
        where = (size / 2, top + half / 2 - 0.5)
        axes[1].text(*where, "halo of chunk 1", ha="center", va="center")
    axes[1].set_title("a worker reads its chunk and the halo")
    for axis in axes:
        axis.set_xlim(-3, size + 2)
        axis.set_ylim(size + 2, -3)
        axis.set_aspect("equal")
        axis.set_axis_off()
    figure.savefig(Path(folder, "nodata_and_halo.png"), dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent
    draw_results(chosen)
    draw_rules(chosen)
