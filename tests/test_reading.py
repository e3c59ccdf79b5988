"""A raster that cannot be read gives a line that names it, and no result."""

import numpy as np
import pytest
import rasterio
from tools import check_failed, damage_end, files, write_raster


def make_missing(path):
    pass


def make_folder(path):
    path.mkdir()


def make_empty(path):
    path.touch()


def make_text(path):
    path.write_text("ncols 3\nthe rest is no raster\n" * 99)


def make_bandless(path):
    path.write_text('<VRTDataset rasterXSize="30" rasterYSize="30"></VRTDataset>')


@pytest.mark.parametrize(
    "make", [make_missing, make_folder, make_empty, make_text, make_bandless]
)
def test_what_is_no_raster_is_named(tmp_path, run_both, make):
    raster = tmp_path / "raster.tif"
    make(raster)
    for cwd, done in run_both(raster):
        check_failed(done, raster)
        assert files(cwd) == []


def make_complex(path):
    write_raster(path, np.zeros((1, 30, 30), np.complex64))


def make_only_alpha(path):
    write_raster(path, np.zeros((1, 30, 30), np.uint8))
    with rasterio.open(path, "r+") as raster:
        raster.colorinterp = [rasterio.enums.ColorInterp.alpha]


@pytest.mark.parametrize("make", [make_complex, make_only_alpha])
def test_raster_without_a_band_to_blur_is_named(tmp_path, run_both, make):
    raster = tmp_path / "raster.tif"
    make(raster)
    for cwd, done in run_both(raster):
        check_failed(done, raster, "no band of real numbers")
        assert files(cwd) == []


def damage_middle(path):
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 9000)  # more than one block


@pytest.mark.parametrize(
    "damage, compress",
    [(damage_end, "none"), (damage_end, "deflate"), (damage_middle, "deflate")],
)
def test_damaged_raster_gives_no_result(tmp_path, run_both, damage, compress):
    raster = tmp_path / "damaged.tif"
    values = np.random.default_rng(0).integers(0, 99, (1, 600, 600), np.int16)
    tiles = {"tiled": True, "blockxsize": 64, "blockysize": 64}
    write_raster(raster, values, compress=compress, **tiles)
    damage(raster)
    for cwd, done in run_both(raster):
        check_failed(done, raster)
        assert files(cwd) in ([], ["smooth"])


def write_vrt(path, *sources, extra=""):
    """Write a virtual raster of 40 x 40 pixels, its sources one below the other."""
    rows = 40 // len(sources)
    sources = "".join(
        f"""<SimpleSource><SourceFilename>{source}</SourceFilename>
        <SourceBand>1</SourceBand><SrcRect xOff="0" yOff="0" xSize="40" ySize="{rows}"/>
        <DstRect xOff="0" yOff="{top}" xSize="40" ySize="{rows}"/></SimpleSource>"""
        for top, source in zip(range(0, 40, rows), sources)
    )
    path.write_text(
        f"""<VRTDataset rasterXSize="40" rasterYSize="40"><VRTRasterBand
        dataType="Float32" band="1"{extra}{sources}</VRTRasterBand></VRTDataset>"""
    )
    return path


@pytest.mark.parametrize("missing", ["missing.tif", "empty.tif", "two\nlines.tif"])
def test_missing_sheet_of_a_virtual_raster_is_named(tmp_path, run_both, missing):
    sheet = write_raster(tmp_path / "sheet.tif", np.ones((1, 20, 40), np.float32))
    (tmp_path / "empty.tif").touch()
    raster = write_vrt(tmp_path / "sheets.vrt", sheet, tmp_path / missing, extra=">")
    for cwd, done in run_both(raster, 3):
        check_failed(done, raster, missing.replace("\n", " "))
        assert files(cwd) in ([], ["smooth"])


def test_hostile_virtual_raster_runs_no_code(tmp_path, run_both):
    sheet = write_raster(tmp_path / "sheet.tif", np.ones((1, 40, 40), np.float32))
    code = f""" subClass="VRTDerivedRasterBand">
        <PixelFunctionType>attack</PixelFunctionType>
        <PixelFunctionLanguage>Python</PixelFunctionLanguage>
        <PixelFunctionCode><![CDATA[
def attack(*arguments, **keywords):
    open({str(tmp_path / "executed")!r}, "w")
]]></PixelFunctionCode>"""
    raster = write_vrt(tmp_path / "hostile.vrt", sheet, extra=code)
    for cwd, done in run_both(raster, 3):
        check_failed(done, raster)
        assert files(cwd) in ([], ["smooth"])
    assert not (tmp_path / "executed").exists()


def test_remote_sheet_that_nobody_serves_gives_no_result(tmp_path, run_both):
    nobody_listens = "/vsicurl/http://127.0.0.1:9/sheet.tif"
    raster = write_vrt(tmp_path / "remote.vrt", nobody_listens, extra=">")
    for cwd, done in run_both(raster, 3):
        check_failed(done, raster)
        assert files(cwd) in ([], ["smooth"])
