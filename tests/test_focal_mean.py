"""The focal mean against independent references, for every kind of raster."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.rpc import RPC
from tools import (
    MULTI,
    ROOT,
    SCRIPTS,
    blur,
    brute_force,
    check_silent,
    need,
    read,
    run,
    started,
    wait_until,
    write_raster,
    write_zeros,
)

rng = np.random.default_rng(2017)


def check(result, bands, valid, window):
    """Compare a result with the mean by brute force; return the result's values."""
    expected = brute_force(bands, valid, window)
    with rasterio.open(result) as raster:
        values = raster.read()
        assert raster.driver == "GTiff"
        assert np.isnan(raster.nodata)
    np.testing.assert_array_equal(np.isnan(values), np.isnan(expected))
    largest = np.abs(np.where(valid, bands, 0).astype(np.float64)).max()
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6 * largest)
    return values


# ---- the mean itself


@pytest.mark.parametrize("window", [3, 15])
@pytest.mark.parametrize("script", SCRIPTS)
def test_mean_is_that_of_gdals_kernel_filter(script, window, tmp_path):
    bands = rng.normal(300, 100, (1, 60, 70)).astype(np.float32)
    write_raster(tmp_path / "dem.tif", bands)
    (tmp_path / "gdal.vrt").write_text(
        f"""<VRTDataset rasterXSize="70" rasterYSize="60">
        <VRTRasterBand dataType="Float64" band="1"><KernelFilteredSource>
        <SourceFilename relativeToVRT="1">dem.tif</SourceFilename>
        <Kernel normalized="1"><Size>{window}</Size>
        <Coefs>{"1 " * window**2}</Coefs></Kernel>
        </KernelFilteredSource></VRTRasterBand></VRTDataset>"""
    )
    with rasterio.open(blur(script, "dem.tif", window, cwd=tmp_path)) as raster:
        values = raster.read(1)
    with rasterio.open(tmp_path / "gdal.vrt") as raster:
        expected = raster.read(1)
    half = window // 2
    frame = np.ones(values.shape, bool)
    frame[half:-half, half:-half] = False
    np.testing.assert_array_equal(np.isnan(values), frame)
    np.testing.assert_allclose(values[~frame], expected[~frame], rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3000, 200), (1, 12, 300000)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_rows_are_written_where_they_belong(script, shape, tmp_path):
    """Several at a time, and one that is longer than several are."""
    bands = rng.normal(300, 100, shape).astype(np.float32)
    write_raster(tmp_path / "dem.tif", bands, interleave="pixel")
    result = tmp_path / blur(script, "dem.tif", 3, cwd=tmp_path)
    check(result, bands, np.ones(shape, bool), 3)


# ---- one script against the other


@pytest.mark.parametrize("window", [15, 51])
def test_both_scripts_agree_over_many_chunks(window, tmp_path):
    bands = rng.normal(300, 100, (3, 900, 4000)).astype(np.float32)
    write_raster(tmp_path / "dem.tif", bands, tiled=True, blockxsize=64, blockysize=64)
    pixels = [read(blur(script, "dem.tif", window, cwd=tmp_path)) for script in SCRIPTS]
    assert pixels[0].tobytes() == pixels[1].tobytes()


def test_shared_code_is_the_same_text():
    """All of the simple script but its docstring, its imports and main."""
    simple, multi = (script.read_text() for script in SCRIPTS)
    shared = simple[simple.index("def choose_bands(") :]
    assert multi.endswith("\n\n\n" + shared)
    assert len(shared) > len(simple) * 0.7
    cache, stops = re.findall("(?m)^(?:CACHE|STOPS) = .*$", simple)
    assert f"\n{cache}\n" in multi
    assert f"\n{stops}\n" in multi


def test_scripts_import_nothing_but_the_three_packages():
    allowed = sys.stdlib_module_names | {"rasterio", "numpy", "scipy"}
    for script in SCRIPTS:
        lines = re.findall(r"(?m)^\s*(?:import|from) (\w+)", script.read_text())
        assert len(lines) > 10
        assert set(lines) <= allowed


# ---- how it is called


@pytest.mark.parametrize("script", SCRIPTS)
def test_last_line_names_the_result(script, tmp_path):
    write_raster(tmp_path / "my dem.v2.img", np.ones((1, 30, 40)), driver="HFA")
    done = run(script, "my dem.v2.img", cwd=tmp_path)
    last = done.stdout.splitlines()[-1]
    text = "smooth/my dem.v2.tif: 40 x 30 pixels, window 15 x 15, "
    assert last.startswith(text)
    assert float(last.removeprefix(text).removesuffix(" seconds")) >= 0
    if script == MULTI:
        assert done.stdout.splitlines()[0] == (
            "0...10...20...30...40...50...60...70...80...90...100 - done."
        )
    assert [path.name for path in (tmp_path / "smooth").iterdir()] == ["my dem.v2.tif"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_raster_in_smooth_is_refused(script, tmp_path):
    need("gdalbuildvrt")
    (tmp_path / "smooth").mkdir()
    write_raster(tmp_path / "smooth/dem.tif", np.ones((1, 30, 40)))
    before = (tmp_path / "smooth/dem.tif").read_bytes()
    (tmp_path / "link").symlink_to("smooth")
    mosaic = tmp_path / "dem.vrt"
    mosaic_of = ["gdalbuildvrt", "-q", mosaic, "smooth/dem.tif"]
    subprocess.run(mosaic_of, cwd=tmp_path, check=True)
    for path in ("smooth/dem.tif", tmp_path / "smooth/dem.tif", "link/dem.tif", mosaic):
        done = run(script, path, cwd=tmp_path)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert "would overwrite" in done.stderr
    assert (tmp_path / "smooth/dem.tif").read_bytes() == before


# ---- kinds of rasters

HEIGHTS = rng.normal(300, 100, (1, 40, 50))


def hole(bands, value):
    """Return the bands with a pixel of the value, and where they are valid."""
    bands = bands.copy()
    bands[:, 20, 30] = value
    return bands, np.arange(bands.size).reshape(bands.shape) % (40 * 50) != 20 * 50 + 30


@pytest.fixture(params=SCRIPTS, ids=["simple", "multiprocessing"])
def blurred(request, tmp_path, run_fast):
    """A function that writes a raster, blurs it and returns input and result, both open."""
    opened = []

    def write_and_blur(bands, name="dem.tif", **profile):
        path = os.path.join(tmp_path, name)  # a Path would make // to /
        if bands is not None:
            write_raster(path, bands, **profile)
        done = run_fast(request.param, path, 5, cwd=tmp_path)
        check_silent(done)
        result = tmp_path / done.stdout.splitlines()[-1].split(": ")[0]
        opened.extend([rasterio.open(path), rasterio.open(result)])
        return opened

    yield write_and_blur
    for raster in opened:
        raster.close()


@pytest.mark.parametrize(
    ("dtype", "nodata", "expected"),
    [
        ("uint8", None, "float32"),
        ("int8", -128, "float32"),
        ("int16", -9999, "float32"),
        ("uint16", 0, "float32"),
        ("int32", -9999, "float64"),
        ("uint32", 0, "float64"),
        ("int64", -9999, "float64"),
        ("float32", -9999, "float32"),
        ("float32", -3.4028234663852886e38, "float32"),
        ("float64", -9999, "float64"),
        ("float64", -1.7976931348623157e308, "float64"),
        ("float64", -1.8e308, "float64"),
    ],
)
def test_types_and_nodata(dtype, nodata, expected, blurred):
    bands = (HEIGHTS / (5 if dtype == "int8" else 2)).clip(1, 120).astype(dtype)
    valid = np.ones(bands.shape, bool)
    if nodata is not None:
        bands, valid = hole(bands, nodata)
    _, result = blurred(bands, nodata=nodata)
    assert result.dtypes == (expected,)
    check(result.name, bands, valid, 5)


def test_integers_beyond_float32_keep_their_digits(blurred):
    bands = np.full((1, 20, 20), 2**24 + 1, np.int32)
    _, result = blurred(bands)
    assert result.read(1)[10, 10] == 2**24 + 1


def test_nan_is_nodata_beside_a_nodata_value(blurred):
    bands, valid = hole(HEIGHTS.astype(np.float32), np.nan)
    bands[0, 5, 5], valid[0, 5, 5] = -9999, False
    _, result = blurred(bands, nodata=-9999)
    check(result.name, bands, valid, 5)


def test_a_mean_of_zero_is_not_nodata(blurred):
    _, result = blurred(np.zeros((1, 40, 50), np.float32), nodata=-9999)
    assert (result.read(1)[2:-2, 2:-2] == 0).all()


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_alpha_is_the_mask_and_not_written(dtype, blurred, tmp_path):
    top = np.iinfo(dtype).max
    bands, valid = hole(rng.integers(1, 200, (4, 40, 50)).astype(dtype), 7)
    bands[3] = np.where(valid[3], top, 0)
    bands[3, 10, 10] = 1  # hardly opaque, but valid
    bands[:3, 20, 30] = 7  # a value like any other
    path = write_raster(tmp_path / "dem.tif", bands, photometric="rgb", alpha="yes")
    with rasterio.open(path) as raster:
        assert raster.colorinterp[3] == ColorInterp.alpha
    _, result = blurred(None)
    assert result.count == 3
    check(result.name, bands[:3], valid[:3], 5)


@pytest.mark.parametrize("internal", [True, False])
def test_mask(internal, blurred, tmp_path):
    bands, valid = hole(HEIGHTS.astype(np.float32), 7)
    path = write_raster(tmp_path / "dem.tif", bands)
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal),
        rasterio.open(path, "r+") as raster,
    ):
        raster.write_mask(valid[0])
    assert (tmp_path / "dem.tif.msk").exists() != internal
    _, result = blurred(None)
    check(result.name, bands, valid, 5)


def test_band_metadata_is_carried_over_and_statistics_are_not(blurred, tmp_path):
    path = write_raster(tmp_path / "dem.tif", HEIGHTS.astype(np.int16).repeat(2, 0))
    with rasterio.open(path, "r+") as raster:
        raster.descriptions = ("height", "depth")
        raster.scales, raster.offsets = (0.1, 2), (2, -5)  # 2 is a palette, too
        raster.units = ("metre", "foot")
        raster.update_tags(1, STATISTICS_MEAN=300, STATISTICS_MAXIMUM=700)
        raster.update_tags(AREA_OR_POINT="Point")
    source, result = blurred(None)
    assert result.descriptions == ("height", "depth")
    assert result.scales == (0.1, 2)
    assert result.offsets == (2, -5)
    assert result.units == ("metre", "foot")
    assert result.tags(1) == {}
    assert result.tags()["AREA_OR_POINT"] == "Point"
    assert result.transform == source.transform
    assert result.crs == source.crs
    check(result.name, source.read(), np.ones(source.read().shape, bool), 5)


@pytest.mark.parametrize(
    ("transform", "crs", "area_or_point"),
    [
        (rasterio.Affine(2, 0, 5e5, 0, -2, 7e6), "EPSG:3067+5717", "Area"),
        (rasterio.Affine(2, 0.5, 5e5, 0.5, -2, 7e6), "EPSG:3067", "Point"),  # rotated
        (rasterio.Affine(2, 0, 5e5, 0, 2, 7e6), "ESRI:54030", "Area"),  # south up
        (rasterio.Affine(0.1, 0, 25, 0, -0.1, 65), "EPSG:4326", "Point"),
    ],
)
def test_geotransform_and_crs(transform, crs, area_or_point, blurred, tmp_path):
    path = write_raster(tmp_path / "dem.tif", HEIGHTS, transform=transform, crs=crs)
    with rasterio.open(path, "r+") as raster:
        raster.update_tags(AREA_OR_POINT=area_or_point)
    source, result = blurred(None)
    assert result.transform == source.transform == transform
    assert result.crs == source.crs == rasterio.CRS.from_string(crs)
    assert result.tags()["AREA_OR_POINT"] == area_or_point


def test_no_georeference_at_all(blurred):
    source, result = blurred(HEIGHTS, crs=None, transform=None)
    assert result.crs is None
    assert result.transform == source.transform == rasterio.Affine.identity()


def test_gcps(blurred):
    gcps = [
        GroundControlPoint(row, column, 25 + column / 50, 65 - row / 40, 12)
        for row, column in [(0, 0), (0, 50), (40, 0), (40, 50)]
    ]
    source, result = blurred(HEIGHTS, transform=None, gcps=gcps, crs="EPSG:4326")
    assert len(source.gcps[0]) == 4
    assert result.gcps[1] == source.gcps[1] == "EPSG:4326"
    places = [
        [(p.row, p.col, p.x, p.y, p.z) for p in r.gcps[0]] for r in (result, source)
    ]
    assert places[0] == places[1]


def test_rpcs(blurred):
    twenty = [1.0, *[0.001] * 19]
    rpcs = RPC(
        height_off=100, height_scale=500, lat_off=65, lat_scale=0.1, long_off=25,
        long_scale=0.1, line_off=20, line_scale=20, samp_off=25, samp_scale=25,
        line_num_coeff=twenty, line_den_coeff=twenty, samp_num_coeff=twenty,
        samp_den_coeff=twenty, err_bias=0, err_rand=0,
    )  # fmt: skip
    source, result = blurred(HEIGHTS, crs=None, transform=None, rpcs=rpcs)
    assert source.rpcs is not None
    assert result.rpcs.to_gdal() == source.rpcs.to_gdal()


@pytest.mark.parametrize(
    "profile",
    [
        {"tiled": True, "blockxsize": 16, "blockysize": 32, "compress": "deflate"},
        {"blockysize": 7, "compress": "lzw", "predictor": 2},
        {"blockysize": 40},
        {"interleave": "pixel"},
    ],
)
def test_layouts(profile, blurred):
    bands, valid = hole(HEIGHTS.astype(np.float32), -9999)
    _, result = blurred(bands, nodata=-9999, **profile)
    check(result.name, bands, valid, 5)
    assert result.compression is None
    assert result.block_shapes[0][1] == result.width  # strips, not tiles


def test_jpeg_does_not_break_the_result(blurred):
    bands = rng.integers(0, 255, (3, 40, 50)).astype(np.uint8)
    source, result = blurred(bands, compress="jpeg", photometric="ycbcr")
    check(result.name, source.read(), np.ones(bands.shape, bool), 5)


def test_virtual_raster_of_the_map_sheets(blurred):
    source, result = blurred(None, name=ROOT / "tests/data/jacksboro.vrt")
    assert source.shape == (344, 403)
    check(result.name, source.read(), np.ones((1, 344, 403), bool), 5)


def test_raster_in_a_zip_file(blurred, tmp_path):
    write_raster(tmp_path / "dem.tif", HEIGHTS)
    with zipfile.ZipFile(tmp_path / "dem.zip", "w") as archive:
        archive.write(tmp_path / "dem.tif", "folder/dem.tif")
    _, result = blurred(None, name=f"/vsizip/{tmp_path}/dem.zip/folder/dem.tif")
    check(result.name, HEIGHTS, np.ones(HEIGHTS.shape, bool), 5)


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((1, 1, 50), 5),
        ((1, 50, 1), 5),
        ((1, 1, 1), 5),
        ((1, 4, 4), 5),
        ((2, 12, 50), 13),
        ((2, 12, 50), 1001),
    ],
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_smaller_than_the_window(shape, window, script, tmp_path):
    write_raster(tmp_path / "dem.tif", np.ones(shape, np.float32))
    done = run(script, "dem.tif", window, cwd=tmp_path)
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("dem.tif: warning: smaller than the window")
    result = read(tmp_path / "smooth/dem.tif")
    assert result.shape == shape
    assert np.isnan(result).all()


def test_all_nodata(blurred):
    _, result = blurred(np.full((1, 40, 50), -9999, np.float32), nodata=-9999)
    assert np.isnan(result.read()).all()


def test_result_larger_than_4_gb_is_a_bigtiff(tmp_path):
    raster = write_zeros(tmp_path / "dem.tif", 33000, 33000)

    def find():
        drafts = (tmp_path / "run").glob("smooth/*.unfinished/dem.tif")
        return [draft for draft in drafts if draft.stat().st_size > 4]

    with (
        started(MULTI, raster, cwd=tmp_path / "run"),
        open(*wait_until(find), "rb") as draft,
    ):
        assert draft.read(4) == b"II+\0"  # 43: BigTIFF's version number


# ---- the sample data and the code's form


def test_sample_data_can_be_made_again(tmp_path):
    need("gdalbuildvrt")
    run(ROOT / "tests/data/make_data.py", tmp_path, cwd=tmp_path).check_returncode()
    made = sorted(path.name for path in tmp_path.iterdir())
    names = ["jacksboro.vrt", *(f"jacksboro_{s}.tif" for s in ("ne", "nw", "se", "sw"))]
    assert made == names
    for name in names:
        with (
            rasterio.open(tmp_path / name) as new,
            rasterio.open(ROOT / "tests/data" / name) as kept,
        ):
            assert new.profile == kept.profile
            np.testing.assert_array_equal(new.read(), kept.read())


def test_mapsheets_lists_the_four_sheets():
    sheets = (ROOT / "mapsheets.txt").read_text().split()
    assert len(sheets) == 4
    assert all((ROOT / sheet).exists() for sheet in sheets)


@pytest.mark.parametrize(
    "command",
    [
        "ruff check .",
        "ruff format --check .",
        "codespell --skip ./.git,./.venv*,./smooth .",
        "shellcheck --exclude=SC1091 array_job.sh tests/run.sh .ci/run",
        "shellcheck tests/slurm/start.sh tests/slurm/stop.sh tests/slurm/try_elsewhere.sh",
        "shellcheck --exclude=SC1091 batch_job_simple.sh batch_job_multiprocessing.sh",
    ],
)
def test_form(command):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    need(command.split()[0], path=path)
    done = subprocess.run(
        command.split(),
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
