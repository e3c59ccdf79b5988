"""Files as people have them: what is said of them, and what their results carry."""

import os
import subprocess

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from scipy.io import netcdf_file
from tools import (
    MULTI,
    SCRIPTS,
    SIMPLE,
    blur,
    check_failed,
    check_silent,
    files,
    need,
    read,
    run,
    write_earlier,
    write_raster,
)

ONES = np.ones((1, 40, 50), np.float32)


def write_netcdf(path, version=1, shape=(40, 50), names=("red", "nir")):
    """Write a classic netCDF (1) or one with 64-bit offsets (2); return its path."""
    with netcdf_file(path, "w", version=version) as file:
        file.createDimension("y", shape[0])
        file.createDimension("x", shape[1])
        for number, name in enumerate(names):
            variable = file.createVariable(name, "f", ("y", "x"))
            variable[:] = np.arange(np.prod(shape)).reshape(shape) % 997 + number
            variable.valid_range = np.array([0, 9], "f")
            variable.long_name = f"the {name} band"
    return path


def convert(source, target, *options):
    """Convert a raster with gdal_translate; return the new path."""
    need("gdal_translate")
    command = ["gdal_translate", "-q", *options, source, target]
    subprocess.run(list(map(str, command)), check=True)
    return target


# ---- names and what is told of results


@pytest.mark.parametrize(
    ("raster", "name"),
    [
        ("netcdf:x.nc:red", "x_red"),
        ('NETCDF:"x.nc":nir', "x_nir"),
        ('NETCDF:"{folder}/x.nc":nir', "x_nir"),
        ("GTIFF_DIR:1:{folder}/my.dem.v2.tif", "1_my.dem.v2"),
        ("GPKG:tables.gpkg:one", "tables_one"),
        ("GPKG:{folder}/tables.gpkg:two", "tables_two"),
        ("vrt://my.dem.v2.tif?bands=1", "my.dem.v2_bands_1"),
        ("/vsisubfile/0_9999999,{folder}/my.dem.v2.tif", "0_9999999_my.dem.v2"),
        ("my.dem.v2.tif", "my.dem.v2"),
        ("maps.v2/dem", "dem"),
    ],
)
def test_result_has_a_name_of_its_own(tmp_path, run_both, raster, name):
    for script in SCRIPTS:
        cwd = tmp_path / script.stem
        (cwd / "maps.v2").mkdir(parents=True)
        write_netcdf(cwd / "x.nc")
        dem = write_raster(cwd / "my.dem.v2.tif", ONES)
        (cwd / "maps.v2" / "dem").write_bytes(dem.read_bytes())
        for table in ("one", "two"):
            options = ["-of", "GPKG", "-ot", "Byte", "-co", f"RASTER_TABLE={table}"]
            options += ["-co", "APPEND_SUBDATASET=YES"]
            convert(dem, cwd / "tables.gpkg", *options)
        done = run(script, raster.format(folder=cwd), cwd=cwd)
        check_silent(done)
        assert files(cwd / "smooth") == [f"{name}.tif"]


def test_result_says_how_it_was_made(tmp_path, run_both):
    raster = write_raster(tmp_path / "dem.tif", ONES)
    for window in (25, 5):
        for cwd, done in run_both(raster, window):
            check_silent(done)
            last = done.stdout.splitlines()[-1]
            replaced = ", in place of an earlier result of window 25 x 25, "
            assert (replaced in last) == (window == 5)
            with rasterio.open(cwd / "smooth/dem.tif") as result:
                assert result.tags()["FOCAL_MEAN_WINDOW"] == f"{window} x {window}"
                assert result.tags()["FOCAL_MEAN_OF"] == str(raster)


@pytest.mark.parametrize("script", SCRIPTS)
def test_whole_result_is_no_failure(tmp_path, script):
    raster = write_raster(tmp_path / "höhe.tif", ONES)
    done = run(script, raster, cwd=tmp_path, PYTHONIOENCODING="ascii")
    check_silent(done)
    assert "smooth/h\\xf6he.tif: 50 x 40" in done.stdout
    assert read(tmp_path / "smooth/höhe.tif").shape == ONES.shape
    command = f"exec {os.sys.executable} {script} höhe.tif > /dev/full"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)


# ---- what the result carries


def test_coordinate_system_that_geotiff_cannot_hold(tmp_path, run_both):
    crs = rasterio.CRS.from_wkt(
        """GEOGCRS["rotated",BASEGEOGCRS["sphere",DATUM["sphere",
        ELLIPSOID["sphere",6371229,0]]],DERIVINGCONVERSION["pole",
        METHOD["Pole rotation (netCDF CF convention)"],
        PARAMETER["Grid north pole latitude (netCDF CF convention)",39.25],
        PARAMETER["Grid north pole longitude (netCDF CF convention)",-162],
        PARAMETER["North pole grid longitude (netCDF CF convention)",0]],
        CS[ellipsoidal,2],AXIS["latitude",north],AXIS["longitude",east],
        ANGLEUNIT["degree",0.0174532925199433]]"""
    )
    for place, sidecar in (crs, ["dem.tif.aux.xml"]), ("EPSG:3067", []):
        raster = write_raster(tmp_path / "dem.tif", ONES, crs=place)
        for cwd, done in run_both(raster):
            check_silent(done)
            assert files(cwd / "smooth") == ["dem.tif", *sidecar]
            with rasterio.open(raster) as source:
                wanted = source.crs
            with rasterio.open(cwd / "smooth/dem.tif") as result:
                assert result.crs == wanted


def test_bands_of_different_types(tmp_path, run_both):
    values = np.random.default_rng(0).integers(0, 99, (1, 40, 50))
    for dtype in ("float32", "uint8"):
        write_raster(tmp_path / f"{dtype}.tif", values.astype(dtype))
    sheets = [tmp_path / "float32.tif", tmp_path / "uint8.tif"]
    vrt = tmp_path / "both.vrt"
    need("gdalbuildvrt")
    subprocess.run(["gdalbuildvrt", "-q", "-separate", vrt, *sheets], check=True)
    expected = [read(blur(SIMPLE, sheet, 5, cwd=tmp_path))[0] for sheet in sheets]
    for cwd, done in run_both(vrt, 5):
        check_silent(done)
        np.testing.assert_array_equal(read(cwd / "smooth/both.tif"), expected)


def test_gcps_without_a_coordinate_system(tmp_path, run_both):
    corners = [(0, 0), (0, 50), (40, 0)]
    gcps = [GroundControlPoint(r, c, 9 + c / 50, 65 - r / 40) for r, c in corners]
    crs = rasterio.CRS()
    raster = write_raster(tmp_path / "a.tif", ONES, transform=None, gcps=gcps, crs=crs)
    for cwd, done in run_both(raster):
        check_silent(done)
        with rasterio.open(cwd / "smooth/a.tif") as result:
            places = [(p.row, p.col, p.x, p.y) for p in result.gcps[0]]
        assert places == [(p.row, p.col, p.x, p.y) for p in gcps]


def test_colours_stay_and_tags_that_are_false_go(tmp_path, run_both):
    rgb = ONES.astype(np.uint8).repeat(3, 0)
    raster = write_raster(tmp_path / "a.tif", rgb, photometric="rgb")
    kept = {"GRIB_ELEMENT": "T", "NETCDF_DIM_time": "3"}
    false = {"STATISTICS_MEAN": "1", "valid_range": "{0,9}", "_FillValue": "7"}
    with rasterio.open(raster, "r+") as file:
        file.update_tags(2, **kept, **false)
        file.update_tags(**{f"red#{key}": value for key, value in false.items()})
        file.update_tags(**{"red#long_name": "red"})
    convert(raster, tmp_path / "b.vrt", "-mo", "bidx=1", "-mo", "ns=RPC")
    for name in ("a.tif", "b.vrt"):
        for cwd, done in run_both(tmp_path / name):
            check_silent(done)
            with rasterio.open((cwd / "smooth" / name).with_suffix(".tif")) as result:
                colours = [colour.name for colour in result.colorinterp]
                assert colours == ["red", "green", "blue"]
                assert result.tags(2) == kept
                tags = result.tags().keys() - {"FOCAL_MEAN_WINDOW", "FOCAL_MEAN_OF"}
                assert tags == {"AREA_OR_POINT", "red#long_name"}


# ---- what is said


def colour_table(path):
    write_raster(path, ONES.astype(np.uint8))
    with rasterio.open(path, "r+") as raster:
        raster.write_colormap(1, {1: (200, 0, 0, 255)})


def category_names(path):
    write_raster(path, ONES.astype(np.uint8))
    text = "<PAMDataset><PAMRasterBand band='1'><CategoryNames><Category>a</Category>"
    text += "<Category>b</Category></CategoryNames></PAMRasterBand></PAMDataset>"
    path.with_name(path.name + ".aux.xml").write_text(text)


@pytest.mark.parametrize("make", [colour_table, category_names])
def test_codes_are_warned_of(tmp_path, run_both, make):
    raster = tmp_path / "classes.tif"
    make(raster)
    for cwd, done in run_both(raster):
        assert done.returncode == 0
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"{raster}: warning: its numbers are codes")
        with rasterio.open(cwd / "smooth/classes.tif") as result:
            assert result.colorinterp == (ColorInterp.gray,)


def test_nodata_beyond_the_type_is_no_warning(tmp_path, run_both):
    raster = write_raster(tmp_path / "a.tif", ONES.astype(np.float64), nodata=1e39)
    vrt = tmp_path / "b.vrt"
    text = """<VRTDataset rasterXSize="50" rasterYSize="40"><VRTRasterBand band="1"
        dataType="Float32"><NoDataValue>1e39</NoDataValue><SimpleSource>
        <SourceFilename relativeToVRT="1">a.tif</SourceFilename>
        </SimpleSource></VRTRasterBand></VRTDataset>"""
    vrt.write_text(text)
    for path in (raster, vrt):
        for _, done in run_both(path):
            check_silent(done)


def test_rpcs_that_are_not_whole_are_no_failure(tmp_path, run_both):
    raster = write_raster(tmp_path / "a.tif", ONES, crs=None, transform=None)
    text = "<PAMDataset><Metadata domain='RPC'><MDI key='LINE_OFF'>1</MDI></Metadata>"
    (tmp_path / "a.tif.aux.xml").write_text(text + "</PAMDataset>")
    for cwd, done in run_both(raster):
        check_silent(done)
        assert files(cwd / "smooth") == ["a.tif"]


def many_variables(path):
    write_netcdf(path, names=[f"v{number}" for number in range(54)])


def complex_integers(path):
    write_raster(path.with_name("r.tif"), ONES)
    convert(path.with_name("r.tif"), path, "-of", "GTiff", "-ot", "CInt16")


def truncated(path):
    write_raster(path, np.random.default_rng(0).random((1, 600, 600)))
    os.truncate(path, path.stat().st_size // 2)


def missing(path):
    pass


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (many_variables, "several variables, name one of them: netcdf:"),
        (complex_integers, "no band of real numbers"),
        (truncated, "is it damaged?"),
        (missing, "No such file"),
    ],
)
def test_reasons(tmp_path, run_both, make, words):
    raster = tmp_path / "a.nc"
    make(raster)
    for cwd, done in run_both(raster):
        check_failed(done, raster, words)
        (line,) = done.stderr.splitlines()
        assert len(line) < 700
        assert make == many_variables or line.count(str(raster)) == 1
        assert files(cwd) in ([], ["smooth"])


@pytest.mark.parametrize(
    "spelt",
    [
        "/vsisubfile/0_99999999,smooth/dem.tif",
        "/vsisubfile/0_99999999,{folder}/smooth/dem.tif",
        "GTIFF_DIR:1:smooth/dem.tif",
        "vrt://smooth/dem.tif?bands=1",
        "./smooth/../smooth/dem.tif",
        "outer/dem.vrt",
    ],
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_result_never_replaces_what_is_none_of_its_raster(tmp_path, script, spelt):
    (tmp_path / "smooth").mkdir()
    (tmp_path / "outer").mkdir()
    dem = write_raster(tmp_path / "smooth/dem.tif", ONES)
    inner = tmp_path / "inner.vrt"
    for target, source in (inner, dem), (tmp_path / "outer/dem.vrt", inner):
        need("gdalbuildvrt")
        subprocess.run(["gdalbuildvrt", "-q", target, source], check=True)
    # The result's name has to be that of the file, whatever the raster is called.
    text = script.read_text().replace('"_".join(words)', '"dem"')
    (tmp_path / script.name).write_text(text)
    before = dem.read_bytes()
    done = run(script.name, spelt.format(folder=tmp_path), cwd=tmp_path)
    check_failed(done, spelt.format(folder=tmp_path), "would overwrite")
    assert dem.read_bytes() == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_result_never_replaces_what_its_raster_reads(tmp_path, script):
    """Though it is an earlier result of a virtual raster that had other sheets then."""
    (tmp_path / "smooth").mkdir()
    earlier = write_earlier(tmp_path / "smooth/all.tif", "all.vrt")
    need("gdalbuildvrt")
    command = ["gdalbuildvrt", "-q", "all.vrt", "smooth/all.tif"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = run(script, "all.vrt", cwd=tmp_path)
    check_failed(done, "all.vrt", "would overwrite smooth/all.tif")
    assert (tmp_path / "smooth/all.tif").read_bytes() == earlier


@pytest.mark.parametrize("script", SCRIPTS)
def test_result_never_replaces_one_that_came_meanwhile(tmp_path, script):
    """As two tasks of an array job may blur two sheets of one name."""
    write_raster(tmp_path / "dem.tif", ONES)
    earlier = write_earlier(tmp_path / "other.tif", "other/dem.tif")
    text = script.read_text()
    place = "        yield draft, starts, raster.width\n"
    assert place in text
    text = text.replace(place, f"{place}        Path('other.tif').rename(target)\n")
    (tmp_path / script.name).write_text(text)
    done = run(script.name, "dem.tif", cwd=tmp_path)
    check_failed(done, "dem.tif", "would overwrite smooth/dem.tif")
    assert files(tmp_path / "smooth") == ["dem.tif"]
    assert (tmp_path / "smooth/dem.tif").read_bytes() == earlier


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("spelt", ["dem.tif", "./dem.tif", "{folder}/dem.tif"])
def test_result_replaces_one_of_the_same_raster(tmp_path, script, spelt):
    write_raster(tmp_path / "dem.tif", ONES)
    (tmp_path / "smooth").mkdir()
    write_earlier(tmp_path / "smooth/dem.tif", "dem.tif")
    done = run(script, spelt.format(folder=tmp_path), cwd=tmp_path)
    check_silent(done)
    assert read(tmp_path / "smooth/dem.tif").shape == ONES.shape


# ---- processes that read one file


def classic(path):
    return write_netcdf(path / "classic.nc", 1, (3000, 4000), ["red"])


def offset_64(path):
    return write_netcdf(path / "offset.nc", 2, (3000, 4000), ["red"])


def netcdf_4(path):
    return convert(
        classic(path), path / "four.nc", "-of", "netCDF", "-co", "FORMAT=NC4"
    )


def raw_band(path):
    pixels = np.arange(12_000_000, dtype="<f4").reshape(3000, 4000) % 997
    pixels.tofile(path / "raw.bin")
    (path / "raw.vrt").write_text(
        """<VRTDataset rasterXSize="4000" rasterYSize="3000">
        <VRTRasterBand dataType="Float32" band="1" subClass="VRTRawRasterBand">
        <SourceFilename relativeToVRT="1">raw.bin</SourceFilename>
        <ImageOffset>0</ImageOffset><PixelOffset>4</PixelOffset>
        <LineOffset>16000</LineOffset><ByteOrder>LSB</ByteOrder>
        </VRTRasterBand></VRTDataset>"""
    )
    return path / "raw.vrt"


def warped(path):
    place = ["-a_srs", "EPSG:3067", "-a_ullr", "0", "6000", "8000", "0"]
    source = convert(classic(path), path / "placed.vrt", "-of", "VRT", *place)
    need("gdalwarp")
    command = ["gdalwarp", "-q", "-of", "VRT", source, path / "warped.vrt"]
    subprocess.run(command, check=True)
    return path / "warped.vrt"


@pytest.mark.parametrize("make", [classic, offset_64, netcdf_4, raw_band, warped])
def test_processes_do_not_disturb_each_others_reading(tmp_path, make):
    """RUNS=20 pytest ... runs each more often."""
    raster = make(tmp_path)
    simple = blur(SIMPLE, raster, 5, cwd=tmp_path)
    expected = read(simple).tobytes()
    for cpus in "2347" * (int(os.environ.get("RUNS", "4")) // 4):
        simple.unlink()
        result = blur(MULTI, raster, 5, cwd=tmp_path, SLURM_CPUS_PER_TASK=cpus)
        assert read(result).tobytes() == expected, cpus
