"""Rasters that processes read at once: behind HTTP, or in a file that a library keeps open.

More runs of each raster than usual: RUNS=15 pytest tests/test_http.py
"""

import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import numpy as np
import pytest
import rasterio
from rasterio.shutil import copy
from rasters import brute_force, read, write_netcdf, write_vrt
from runs import MULTI, SIMPLE, check_silent

SHAPE = 1100, 1000  # rows and columns
VALUES = (np.arange(np.prod(SHAPE)).reshape(1, *SHAPE) % 997).astype("f4")


class Handler(BaseHTTPRequestHandler):
    """Sends parts of files, and keeps the connections, as large servers do."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name, _, query = self.path[1:].partition("?")
        path = self.server.folder / name
        there = path.is_file() and "." not in query  # ?sig=....msk is another file
        data = path.read_bytes() if there else b""
        part = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = map(int, part.groups()) if part else (0, len(data))
        answer = data[first : last + 1]
        place = f"bytes {first}-{first + len(answer) - 1}/{len(data)}"
        self.send_response(404 if not data else 206 if part else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.send_header("Content-Range", place)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(answer)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def address(tmp_path):
    """Serve the test's folder; return how GDAL calls it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.folder = tmp_path
        threading.Thread(target=server.serve_forever).start()
        yield f"/vsicurl/http://127.0.0.1:{server.server_port}"
        server.shutdown()


def check_often(run_fast, tmp_path, raster, local):
    """Check what three processes make of a raster, several times."""
    check_silent(run_fast(SIMPLE, local, 5, cwd=tmp_path))
    (simple,) = (tmp_path / "smooth").iterdir()
    expected, values = read(simple), read(local)
    mean = brute_force(values, True, 5)
    np.testing.assert_allclose(expected, mean, rtol=0, atol=1e-3, err_msg=str(local))
    cwd = tmp_path / "multi"
    cwd.mkdir()
    for number in range(int(os.environ.get("RUNS", "2"))):
        done = run_fast(MULTI, raster, 5, cwd=cwd, SLURM_CPUS_PER_TASK="3")
        check_silent(done)
        (result,) = (cwd / "smooth").iterdir()
        np.testing.assert_array_equal(read(result), expected, f"{raster}, run {number}")


@pytest.mark.parametrize("kind", ["none", "deflate", "vrt"])
def test_raster_behind_http(tmp_path, run_fast, address, dem, kind):
    compress = kind.replace("vrt", "none")
    tiles = {"tiled": True, "blockxsize": 128, "blockysize": 128}
    local = dem(VALUES, compress=compress, **tiles)
    raster = f"{address}/dem.tif"
    if kind == "vrt":
        changes = {'relativeToVRT="1">dem.tif': f">{raster}"}
        raster = write_vrt(tmp_path / "remote.vrt", local, changes)
    check_often(run_fast, tmp_path, raster, local)


@pytest.mark.parametrize("kind", ["netcdf_3", "netcdf_4", "raw"])
def test_processes_do_not_disturb_each_others_reading(tmp_path, run_fast, dem, kind):
    if kind == "raw":
        raster = dem(VALUES, driver="ENVI")
    else:
        raster = write_netcdf(tmp_path / "old.nc", shape=SHAPE, names=["red"])
        if kind == "netcdf_4":
            old, raster = raster, tmp_path / "new.nc"
            copy(old, raster, driver="netCDF", FORMAT="NC4")
    check_often(run_fast, tmp_path, raster, raster)


def test_secrets_of_an_address_are_not_told(tmp_path, run_both, address, dem):
    """Neither in the result's name nor its tags, nor in an error; but addresses differ."""
    dem(VALUES[:, :40, :50])
    web = address.removeprefix("/vsicurl/")
    rasters = [f"{address}/dem.tif?sig=SECRET&part={part}" for part in (1, 2)]
    host = web.replace("http://", "http://anna:SECRET@")
    rasters += [f"/vsicurl/{host}/dem.tif"]
    rasters += [f"/vsicurl?max_retry=1&url={quote(web, '')}%2Fdem.tif%3Fsig%3DSECRET"]
    for raster in rasters * 2:  # the second time, each replaces its own result
        for _, done in run_both(raster, 3):
            check_silent(done)
    results = list(tmp_path.glob("*/smooth/*"))
    assert len(results) == 2 * len(rasters), results
    for path in results:
        with rasterio.open(path) as result:
            assert "SECRET" not in f"{path} {result.tags()}"
    upper = f"HTTP://anna:SECRET@{web.removeprefix('http://')}/dem.tif?key=SECRET"
    for raster in [*rasters, upper]:
        for _, done in run_both(raster.replace("dem.tif", "missing.tif"), 3):
            assert done.returncode == 1
            assert "SECRET" not in done.stdout + done.stderr, done
