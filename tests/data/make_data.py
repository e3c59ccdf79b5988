"""Make the sample data again: four map sheets of an elevation model, and a mosaic.

    python tests/data/make_data.py [FOLDER]

Writes to the folder of this file unless another one is given. Needs matplotlib, which
brings the elevations, and the program gdalbuildvrt.
"""

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import rasterio

ROW, COLUMN = 150, 220  # where the sheets touch, in pixels

folder = Path(sys.argv[1] if len(sys.argv) > 1 else __file__ + "/..").resolve()
dem = np.load(Path(matplotlib.get_data_path(), "sample_data/jacksboro_fault_dem.npz"))
elevation = dem["elevation"]
# What the package calls ymin belongs to the first row, which is the northern one.
whole = rasterio.transform.from_origin(
    float(dem["xmin"]), float(dem["ymin"]), float(dem["dx"]), float(dem["dy"])
)
north, south = slice(0, ROW), slice(ROW, elevation.shape[0])
west, east = slice(0, COLUMN), slice(COLUMN, elevation.shape[1])
sheets = {"nw": (north, west), "ne": (north, east), "sw": (south, west)}
sheets["se"] = (south, east)
profile = {"crs": "EPSG:4326", "nodata": -32768, "compress": "deflate", "count": 1}
for sheet, (rows, columns) in sheets.items():
    pixels = elevation[rows, columns]
    profile |= dict(zip(("height", "width"), pixels.shape), dtype=pixels.dtype)
    profile["transform"] = whole * whole.translation(columns.start, rows.start)
    with rasterio.open(folder / f"jacksboro_{sheet}.tif", "w", **profile) as raster:
        raster.write(pixels, 1)
        raster.units = ("metre",)
names = [f"jacksboro_{sheet}.tif" for sheet in sheets]
subprocess.run(["gdalbuildvrt", "-q", "jacksboro.vrt", *names], cwd=folder, check=True)
