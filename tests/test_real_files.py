"""Files as people have them: what is said of them, and what their results carry."""

import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio import Affine
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.rpc import RPC
from rasters import read, write_earlier, write_netcdf, write_raster, write_vrt
from runs import NAMES, SCRIPTS, check_failed, check_silent, files

ONES = np.ones((1, 40, 50), np.float32)
BYTES = ONES.astype(np.uint8)
PROGRESS = "0...10...20...30...40...50...60...70...80...90...100 - done.\n"


def test_each_raster_has_a_result_of_its_own(tmp_path, run_both):
    """Its name has letters, digits and a few signs. A second run replaces it."""
    deep = tmp_path / ("d" * 120) / ("e" * 120)
    for folder in deep, tmp_path / "maps.v2":
        folder.mkdir(parents=True)
    for folder in deep, tmp_path:
        write_netcdf(folder / "x.nc")
    dem = write_raster(tmp_path / "maps.v2" / "dem", BYTES)
    for table, append in ("one", "NO"), ("two", "YES"):
        options = {"RASTER_TABLE": table, "APPEND_SUBDATASET": append}
        write_raster(tmp_path / "t.gpkg", BYTES, driver="GPKG", **options)
    rasters = [dem, f"GTIFF_DIR:1:{dem}", f"/vsisubfile/0_9999999,{dem}"]
    rasters += ["vrt://../maps.v2/dem?bands=1", f'NETCDF:"{tmp_path}/x.nc":nir']
    rasters += ['NETCDF:"../x.nc":nir', "netcdf:../x.nc:red"]
    rasters += ["GPKG:../t.gpkg:one", f"GPKG:{tmp_path}/t.gpkg:two"]
    rasters += [f"netcdf:{deep}/x.nc:red", f"netcdf:{deep}/x.nc:nir"]
    for raster in [*rasters, *rasters, "../maps.v2/dem", "./../maps.v2/dem"]:
        for cwd, done in run_both(raster):
            check_silent(done)
    names = files(cwd / "smooth")
    assert len(names) == len(rasters) and "dem.tif" in names
    assert all(re.fullmatch(r"[\w.-]+\.tif", name) for name in names), names


ODD = [" a.tif", "a.tif ", "\ta\t.tif", "a\nb", "a\x01b"]


@pytest.mark.parametrize("name", [*NAMES, "dem.v2.x", *ODD, "ä" * 120, "b" * 240])
def test_no_name_is_refused_executed_or_forgotten(run_both, folders, small, name):
    """A second run replaces the result of the first, also where the name is long."""
    for cwd in folders:
        shutil.copy(small, cwd / name)
    made = f"smooth/{Path(name).stem}.tif"
    for window in (25, 5):
        for cwd, done in run_both(*["--"] * name.startswith("-"), name, window):
            check_silent(done)
            line = f"{made}: 150 x 200 pixels x 1 band, window {window} x {window}\n"
            assert done.stdout == PROGRESS + line
            assert files(cwd) == sorted([name, "smooth", made])
            with rasterio.open(cwd / made) as result:
                assert result.tags()["FOCAL_MEAN_WINDOW"] == str(window)
                source = re.sub(r"[\0-\x1f]", "?", f"{cwd}/{name}").strip()
                assert result.tags()["FOCAL_MEAN_OF"].strip() == source


OUTPUTS = ["", ">&-", ">/dev/full", "| true", "2>/dev/full", "2>&-"]


@pytest.mark.parametrize("script, output", product(SCRIPTS, OUTPUTS))
def test_result_is_whole_though_nobody_hears_of_it(tmp_path, script, output):
    """Where nothing can be printed, or nothing but ASCII."""
    raster = write_raster(tmp_path / "höhe.tif", ONES)
    line = "set -o pipefail; export SLURM_MEM_PER_CPU=" + "1" * ("2>" in output)
    line += f'; PYTHONIOENCODING=ascii "$@" {output}'
    command = ["bash", "-c", line, "bash", sys.executable, script, raster]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b""), done
    assert read(tmp_path / "smooth/höhe.tif").shape == ONES.shape


STALE = ["actual_range", "TIFFTAG_MINSAMPLEVALUE", "missing_value", "NODATA_VALUES"]
NOT_STALE = ["sample_date", "landfill_id", "TIFFTAG_SOFTWARE", "range_of_species"]


def test_what_is_said_of_bands_stays_and_what_is_false_goes(tmp_path, blurred, dem):
    raster = dem(BYTES.repeat(3, 0), photometric="rgb")
    said = {"descriptions": ("height", "depth", None), "units": ("metre", "foot", None)}
    said |= {"scales": (0.1, 2, 1), "offsets": (2, -5, 0)}  # 2 is a palette, too
    kept = {"GRIB_ELEMENT": "T", "NETCDF_DIM_time": "3"}
    false = {"STATISTICS_MEAN": "1", "valid_range": "{0,9}", "_FillValue": "7"}
    with rasterio.open(raster, "r+") as file:
        for item, values in said.items():
            setattr(file, item, values)
        file.update_tags(2, **kept, **false)
        file.update_tags(**{key: "7" for key in STALE}, **dict.fromkeys(NOT_STALE, "7"))
        file.update_tags(**{f"red#{key}": value for key, value in false.items()})
        file.update_tags(**{"red#long_name": "red"})
    names = '<Metadata>\n<MDI key="bidx">1</MDI>\n<MDI key="ns">RPC</MDI>'
    vrt = write_vrt(tmp_path / "names.vrt", raster, {"<Metadata>": names})
    with rasterio.open(blurred(vrt)) as result:
        assert [color.name for color in result.colorinterp] == ["red", "green", "blue"]
        assert {item: getattr(result, item) for item in said} == said
        assert [result.tags(band) for band in (1, 2, 3)] == [{}, kept, {}]
        tags = result.tags().keys() - {"FOCAL_MEAN_WINDOW", "FOCAL_MEAN_OF"}
        assert tags == {"AREA_OR_POINT", "red#long_name", *NOT_STALE}


def test_colour_table_does_not_stay(blurred, dem):
    raster = dem(BYTES, photometric="palette")
    assert rasterio.open(raster).colorinterp == (ColorInterp.palette,)
    assert rasterio.open(blurred(raster)).colorinterp == (ColorInterp.gray,)


TWENTY = [1.0, *[0.001] * 19]
RPCS = RPC(9, 50, 65, 0.1, TWENTY, TWENTY, 20, 20, 25, 0.1, TWENTY, TWENTY, 25, 25)
POINTS = [(0, 0, 25, 65, 12), (0, 50, 26, 65, 12), (40, 0, 25, 64, 9)]
GCPS = [GroundControlPoint(*point) for point in POINTS]


@pytest.mark.parametrize(
    ("area_or_point", "crs", "place"),
    [
        ("Area", "EPSG:3067+5717", {}),
        ("Point", "EPSG:3067", {"transform": Affine(2, 0.5, 5, 0.5, -2, 7)}),  # rotated
        ("Area", "ESRI:54030", {"transform": Affine(2, 0, 5, 0, 2, 7)}),  # south up
        # GeoTIFF cannot hold this one.
        ("Point", "+proj=ob_tran +o_proj=longlat +o_lon_p=9 +o_lat_p=9 +lon_0=9", {}),
        ("Area", None, {"transform": None}),
        ("Area", None, {"transform": None, "gcps": GCPS}),
        ("Area", "EPSG:4326", {"transform": None, "gcps": GCPS}),
        ("Area", None, {"transform": None, "rpcs": RPCS}),
    ],
)
def test_place_stays(area_or_point, crs, place, blurred, dem):
    tags = {"AREA_OR_POINT": area_or_point}
    raster = dem(ONES, crs=crs or rasterio.CRS(), tags=tags, **place)
    path = blurred(raster)
    places = []
    for name in (raster, path):
        with rasterio.open(name) as file:
            points = [(p.row, p.col, p.x, p.y, p.z) for p in file.gcps[0]]
            assert bool(points) == ("gcps" in place)
            assert bool(file.rpcs) == ("rpcs" in place)
            assert (file.crs or file.gcps[1]) == crs
            rpcs = file.rpcs and file.rpcs.to_gdal()
            tags = file.tags().get("AREA_OR_POINT")
            names = [Path(name).name for name in file.files]
            systems = file.crs, file.gcps[1]
            places.append((file.transform, points, systems, rpcs, tags, names))
    assert places[0] == places[1]
    assert files(path.parent) == places[0][-1]


NO_RASTER = ["ncols 3\n" * 99, "", "missing", "folder"]
NO_RASTER += ['<VRTDataset rasterXSize="30" rasterYSize="30"></VRTDataset>']
NO_BAND = ["complex64", "complex_int16", "alpha", "variables"]


@pytest.mark.parametrize("kind", NO_RASTER + NO_BAND)
def test_what_is_no_raster_or_has_no_band_to_blur_is_named(tmp_path, run_both, kind):
    raster = tmp_path / "raster.nc"
    words = "no band of real numbers" if kind in NO_BAND else ""
    if kind == "variables":
        write_netcdf(raster, names=[f"v{number}" for number in range(54)])
        words += "; in it are: netcdf:"
    elif kind == "alpha":
        write_raster(raster, BYTES, alpha=True)
    elif kind in NO_BAND:
        write_raster(raster, ONES.astype(np.complex64), dtype=kind)
    elif kind == "missing":
        words = "No such file"
    elif kind == "folder":
        raster.mkdir()
    else:
        raster.write_text(kind)
    for cwd, done in run_both(raster):
        check_failed(done, raster, words)
        assert done.stderr.count("\n") == 1 and len(done.stderr) < 700, done
        assert not words.endswith("numbers") or done.stderr.count(str(raster)) == 1
        assert files(cwd) == []


@pytest.mark.parametrize("cut_off, bands", [(True, 1), (False, 1), (True, 130)])
def test_damaged_raster_gives_no_result(run_both, dem, cut_off, bands):
    values = np.random.default_rng(0).integers(0, 99, (bands, 600, 600), np.int16)
    profile = {"tiled": True, "blockxsize": 64, "blockysize": 64, "interleave": "pixel"}
    raster = dem(values, compress="deflate", **profile)
    with open(raster, "r+b") as file:
        file.seek(raster.stat().st_size // 2)
        if cut_off:
            file.truncate()
        else:
            file.write(b"\xff" * 9000)  # more than one block
    for cwd, done in run_both(raster):
        check_failed(done, raster, "cannot read it: ")
        assert done.stderr.count("\n") == done.stderr.count(str(raster)) == 1, done
        assert files(cwd) == ["smooth"]


REMOTE = "/vsicurl/http://127.0.0.1:9/remote.tif"  # where nobody listens


@pytest.mark.parametrize("name", ["missing.tif", "empty.tif", "two\nlines.tif", REMOTE])
def test_missing_sheet_of_a_virtual_raster_is_named(tmp_path, run_both, dem, name):
    (tmp_path / "empty.tif").touch()
    sheet = os.path.join(tmp_path, name)
    place = "127.0.0.1" if name == REMOTE else ""
    changes = {'relativeToVRT="1">dem.tif': f'relativeToVRT="0">{sheet}'}
    raster = write_vrt(tmp_path / "sheets.vrt", dem(ONES), changes)
    for cwd, done in run_both(raster, 3):
        check_failed(done, raster, place or name.replace("\n", " "))
        assert files(cwd) in ([], ["smooth"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_result_never_replaces_what_is_none_of_its_raster(tmp_path, run_fast, script):
    """Above all the raster itself, or one that it reads, whatever it is called."""
    for folder in ("smooth", "outer"):
        (tmp_path / folder).mkdir()
    dem = write_raster(tmp_path / "smooth/dem.tif", ONES)
    (tmp_path / "link").symlink_to("smooth")
    inner = write_vrt(tmp_path / "inner.vrt", dem)
    write_vrt(tmp_path / "outer/dem.vrt", inner)
    before = dem.read_bytes()
    rasters = ["smooth/dem.tif", dem, "link/dem.tif", "./smooth/../smooth/dem.tif"]
    rasters += ["inner.vrt", "outer/dem.vrt", "vrt://smooth/dem.tif?bands=1"]
    rasters += ["GTIFF_DIR:1:smooth/dem.tif", f"/vsisubfile/0_99999999,{dem}"]
    rasters += ["/vsisubfile/0_99999999,smooth/dem.tif"]
    changes = {'Path("smooth", name_result(raster))': "Path('smooth/dem.tif')"}
    for raster in rasters:
        done = run_fast(script, raster, cwd=tmp_path, changes=changes)
        check_failed(done, raster, "would overwrite smooth/dem.tif: move that")
        assert done.stderr.count("\n") == 1
        assert (dem.read_bytes(), files(dem.parent)) == (before, ["dem.tif"]), raster


def test_result_never_replaces_one_that_came_meanwhile(run_both, folders, dem):
    """As two tasks of an array job may blur two sheets of one name."""
    raster = dem(ONES)
    for cwd in folders:
        earlier = write_earlier(cwd / "other.tif", "other/dem.tif")
    place = "    return Result(path, target, dtype, starts)\n"
    changes = {place: f"    Path('other.tif').rename(target)\n{place}"}
    for cwd, done in run_both(raster, changes=changes):
        check_failed(done, raster, "would overwrite smooth/dem.tif")
        assert files(cwd / "smooth") == ["dem.tif"]
        assert (cwd / "smooth/dem.tif").read_bytes() == earlier


def test_names_in_an_older_encoding_are_left_out(tmp_path, blurred):
    raster = tmp_path / "dem"
    write_raster(raster, BYTES.repeat(2, 0), driver="ENVI")
    header = tmp_path / "dem.hdr"
    text = re.sub(rb"band names = {.*?}", b"", header.read_bytes(), flags=re.DOTALL)
    header.write_bytes(text + "band names = {Höhe, b}\n".encode("latin-1"))
    with rasterio.open(blurred(raster)) as result:
        assert result.descriptions == (None, None)


def test_order_of_bands_that_only_a_newer_gdal_knows(tmp_path, blurred, dem):
    blurred(write_vrt(tmp_path / "tile.vrt", dem(ONES), {">BAND<": ">TILE<"}))


def test_virtual_raster_of_its_own_earlier_result(run_both, folders):
    """Two virtual rasters deep, as it had other sheets when that was made."""
    for cwd in folders:
        earlier = write_earlier(cwd / "smooth/all.tif", "all.vrt")
        write_vrt(cwd / "inner.vrt", cwd / "smooth/all.tif")
        write_vrt(cwd / "all.vrt", cwd / "inner.vrt")
    for cwd, done in run_both("all.vrt", 3):
        check_failed(done, "all.vrt", "would overwrite smooth/all.tif")
        assert (cwd / "smooth/all.tif").read_bytes() == earlier


def test_smooth_can_be_a_link(tmp_path, run_fast):
    """To a folder that is gone; and to one that two projects share."""
    for script in SCRIPTS:
        for name in "a", "b":
            cwd = tmp_path / script.stem / name
            cwd.mkdir(parents=True)
            (cwd / "smooth").symlink_to("../gone/smooth")
            write_raster(cwd / "dem.tif", ONES)
            write_netcdf(cwd / "x.nc")
            for raster in "dem.tif", "netcdf:x.nc:red":
                done = run_fast(script, raster, cwd=cwd)
                if name == "a":
                    check_silent(done)
                else:  # its result would replace that of the other project
                    check_failed(done, raster, "would overwrite smooth/")


def test_name_that_is_taken_shows_before_the_work(run_both, folders, damaged):
    """Were the raster read first, the damage would show."""
    for cwd in folders:
        write_earlier(cwd / "smooth/dem.tif", "other.tif")
    for _, done in run_both(damaged):
        check_failed(done, damaged, "would overwrite")


def test_what_goes_with_a_result_gets_its_name_first(tmp_path, run_both, dem):
    """So that who sees the .tif sees all of it."""
    crs = "+proj=ob_tran +o_proj=longlat +o_lon_p=9 +o_lat_p=9 +lon_0=9"
    raster = dem(ONES, crs=crs)  # which only a .aux.xml can hold
    hook = """
import pathlib
original = pathlib.Path.replace
def replace(self, target):
    print(self.name)
    return original(self, target)
pathlib.Path.replace = replace
"""
    for _, done in run_both(raster, hook=hook):
        check_silent(done)
        assert done.stdout.splitlines()[1:3] == ["dem.tif.aux.xml", "dem.tif"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_mistake_in_the_script_shows_its_line(tmp_path, run_fast, script):
    """Not dressed up as an error of the data or the disk."""
    raster = write_raster(tmp_path / "dem.tif", ONES)
    for old, new in ("1 / window)", "1 / wide)"), ('"bigtiff"', '1: 2, "bigtiff"'):
        done = run_fast(script, raster, cwd=tmp_path, changes={old: new})
        assert done.returncode == 1 and "Traceback" in done.stderr
        assert "disk" not in done.stderr and "line" in done.stderr
        assert done.stderr.splitlines()[-1] == f"{raster}: stopped, no result"
        assert files(tmp_path / "smooth") == []
