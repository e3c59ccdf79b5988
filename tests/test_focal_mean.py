"""The focal mean against independent references, for every kind of raster."""

import zipfile

import numpy as np
import pytest
import rasterio
from rasters import brute_force, read, stack_files, write_raster, write_vrt, write_zeros
from runs import ROOT, SIMPLE, check_failed, check_silent, files

rng = np.random.default_rng(2017)
HEIGHTS = rng.normal(300, 100, (1, 40, 50)).astype(np.float32)


def check(result, bands, valid=True, window=5):
    """Compare a result with the mean by brute force."""
    expected = brute_force(bands, valid, window)
    with rasterio.open(result) as raster:
        values, masks = raster.read(), raster.read_masks()  # which a tag may spoil
        assert (raster.driver, raster.compression) == ("GTiff", None)
        assert np.isnan(raster.nodata)
    np.testing.assert_array_equal(np.isnan(values), np.isnan(expected))
    np.testing.assert_array_equal(masks == 0, np.isnan(expected))
    largest = np.abs(np.where(valid, bands, 0).astype(np.float64)).max()
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6 * largest)


def hole(bands, value):
    """Return the bands with a pixel of the value, and where they are valid."""
    bands, valid = bands.copy(), np.ones(bands.shape, bool)
    bands[:, 20, 30], valid[:, 20, 30] = value, False
    return bands, valid


def test_mean_is_that_of_gdals_kernel_filter(blurred, dem, tmp_path):
    raster = dem(HEIGHTS)
    kernel = f'<Kernel normalized="1"><Size>5</Size><Coefs>{"1 " * 25}</Coefs></Kernel>'
    changes = {"</Simple": f"{kernel}</Simple", "SimpleSource": "KernelFilteredSource"}
    vrt = write_vrt(tmp_path / "gdal.vrt", raster, changes)
    inner = np.s_[0, 2:-2, 2:-2]  # GDAL has values beyond that, too
    mean, expected = read(blurred(raster))[inner], read(vrt)[inner]
    np.testing.assert_allclose(mean, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3000, 200), (1, 12, 300000)])
def test_rows_are_written_where_they_belong(shape, blurred, dem):
    """Several at a time, and one that is longer than several are."""
    bands = rng.normal(300, 100, shape).astype(np.float32)
    check(blurred(dem(bands, interleave="pixel"), 3), bands, window=3)


def test_smaller_than_the_window(blurred, dem):
    for shape in (1, 1, 50), (1, 50, 1), (1, 1, 1), (1, 4, 4), (2, 12, 50):
        raster = dem(np.ones(shape, np.float32))
        for window in ((min(shape[1:]) + 1) | 1, 1001):  # the next odd number, a large
            result = read(blurred(raster, window))
            assert result.shape == shape, window
            assert np.isnan(result).all(), (shape, window)


def test_values_that_need_care(blurred, dem):
    """Integers beyond float32 keep their digits, zero is a mean, all may be nodata."""
    result = read(blurred(dem(np.full((1, 20, 20), 2**24 + 1, np.int32))))
    assert result[0, 10, 10] == 2**24 + 1
    result = read(blurred(dem(HEIGHTS * 0, nodata=-9999)))
    assert (result[0, 2:-2, 2:-2] == 0).all()
    result = read(blurred(dem(HEIGHTS * 0 - 9999, nodata=-9999)))
    assert np.isnan(result).all()


LARGEST = np.finfo(np.float32).max, np.finfo(np.float64).max
SMALL = [("uint8", None), ("int8", -128), ("int16", -9999), ("uint16", 0)]
SMALL += [("float32", -9999), ("float32", -LARGEST[0])]
LARGE = [("int32", -9999), ("uint32", 0), ("int64", -9999), ("float64", -9999)]
LARGE += [("float64", -LARGEST[1]), ("float64", -1.8e308)]


@pytest.mark.parametrize("dtype, nodata", SMALL + LARGE)
def test_types_and_nodata(dtype, nodata, blurred, dem):
    """NaN is nodata, too, beside a nodata value."""
    expected = "float32" if (dtype, nodata) in SMALL else "float64"
    bands, valid = (HEIGHTS / (5 if dtype == "int8" else 2)).clip(1, 120), True
    bands = bands.astype(dtype)
    if nodata is not None:
        bands, valid = hole(bands, nodata)
    if expected == dtype:
        bands[0, 5, 5], valid[0, 5, 5] = np.nan, False
    result = blurred(dem(bands, nodata=nodata))
    assert read(result).dtype == expected
    check(result, bands, valid)


def test_more_than_100_bands_of_different_types_and_nodata_values(blurred, tmp_path):
    """As a virtual raster can have them; rasterio reads bands of one type at a time."""
    bands, valid = hole(HEIGHTS.clip(8, 255).round().repeat(120, 0), 7)
    bands[:60][~valid[:60]] = -9999
    bands[:60, 5, 5] = 7  # a value of these bands
    paths = [tmp_path / f"{number}.tif" for number in range(len(bands))]
    for number, path in enumerate(paths):
        dtype, nodata = (np.float32, -9999) if number < 60 else (np.uint8, 7)
        write_raster(path, bands[[number]].astype(dtype), nodata=nodata)
    check(blurred(stack_files(tmp_path / "both.vrt", *paths)), bands, valid)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 12])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_alpha_is_the_mask_and_not_written(count, dtype, blurred, dem):
    """Beside 1 or 3 bands, GDAL knows that, too."""
    bands, valid = hole(rng.integers(1, 200, (count + 1, 40, 50)).astype(dtype), 7)
    bands[-1] = np.where(valid[0], np.iinfo(dtype).max, 0)
    bands[-1, 10, 10] = 1  # hardly opaque, but valid
    raster = dem(bands, photometric="minisblack", alpha=True)
    check(blurred(raster), bands[:-1], valid[:-1])


def test_nodata_values_that_a_tag_names(blurred, dem):
    """A pixel is invalid if it has them in all bands; what is copied spoils the result."""
    bands, valid = hole(HEIGHTS.repeat(3, 0), 0)
    bands[0, 5, 5] = 0
    raster = dem(bands, tags={"NODATA_VALUES": "0 0 0"})
    check(blurred(raster), bands, valid)


def test_what_is_no_plain_geotiff(blurred, dem, tmp_path):
    """With losses, in a ZIP file, and virtual, also with nodata that no float32 is."""
    rgb = rng.integers(0, 255, (3, 40, 50)).astype(np.uint8)
    with zipfile.ZipFile(tmp_path / "dem.zip", "w") as archive:
        archive.write(dem(HEIGHTS), "folder/dem.tif")
    jpeg = dem(rgb, compress="jpeg", photometric="ycbcr")
    zipped = f"/vsizip/{tmp_path}/dem.zip/folder/dem.tif"
    nodata = {"<Simple": "<NoDataValue>1e39</NoDataValue><Simple"}
    beyond = write_vrt(tmp_path / "beyond.vrt", zipped, nodata)
    for raster in jpeg, zipped, beyond, ROOT / "tests/data/jacksboro.vrt":
        check(blurred(raster), read(raster))


OTHERS = ['"interleave": "pixel"', '"compress": "deflate"', '"blockysize": 2']


@pytest.mark.parametrize("other", [*OTHERS, '"blockysize": 16, "tiled": True'])
def test_another_layout_is_an_error(other, run_both, dem):
    """As pixels would be written to a place that is not theirs."""
    raster = dem(rng.random((2, 600, 5000), np.float32))
    words = "one after the other"
    changes = {'"bigtiff": "IF_SAFER"': f'"bigtiff": "IF_SAFER", {other}'}
    for cwd, done in run_both(raster, changes=changes):
        check_failed(done, raster, words)
        assert files(cwd / "smooth") == []


def test_result_larger_than_4_gb_is_a_bigtiff(run_fast, tmp_path):
    """Its head is, which is there before the work: here none is done."""
    raster = write_zeros(tmp_path / "dem.tif", 33000, 33000)
    changes = {"return Plan(pieces,": "return Plan([],"}
    check_silent(run_fast(SIMPLE, raster, cwd=tmp_path, changes=changes))
    with open(tmp_path / "smooth/dem.tif", "rb") as result:
        assert result.read(4) == b"II+\0"  # 43: BigTIFF's version number


MASKS = ["beside", "inside", "of the raster", "of a band", "values in a tag"]


@pytest.mark.parametrize("kind", MASKS)
def test_nodata_counts_beside_a_mask(kind, blurred, dem, tmp_path):
    """Of each band its own nodata, though GDAL's mask leaves it out."""
    bands, valid = hole(HEIGHTS.repeat(2, 0), -9999)
    bands[0, 5, 5], bands[1, 7, 7] = 0, -9999
    valid[1, 7, 7] = False
    mask = np.ones(bands.shape[1:], bool)
    if kind == "values in a tag":  # hides what is 0 and -9999 in the bands of a pixel
        bands[:, 30, 9] = 0, -9999
        mask[30, 9] = False
    else:
        mask[30, 9:12] = False
    tags = {"NODATA_VALUES": "0 -9999"} if kind == "values in a tag" else {}
    masked = mask if kind in ("inside", "beside") else None
    raster = dem(bands, nodata=-9999, mask=masked, inside=kind == "inside", tags=tags)
    if kind.startswith("of"):
        hidden = write_raster(tmp_path / "mask.tif", 255 * mask[None].astype(np.uint8))
        band = f"""<MaskBand><VRTRasterBand dataType="Byte"><SimpleSource>
            <SourceFilename>{hidden}</SourceFilename></SimpleSource></VRTRasterBand>
            </MaskBand>"""
        end = "</VRTDataset>" if kind == "of the raster" else "</VRTRasterBand>"
        raster = write_vrt(tmp_path / "mask.vrt", raster, {end: band + end})
    check(blurred(raster, 3), bands, valid & mask, window=3)


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_nodata_that_no_float_holds(dtype, blurred, dem, tmp_path):
    bands, valid = hole((HEIGHTS / 2).clip(1, 120).astype(dtype), np.iinfo(dtype).max)
    nodata = f"<NoDataValue>{np.iinfo(dtype).max}</NoDataValue>"
    changes = {"<Simple": f"{nodata}<Simple"}
    vrt = write_vrt(tmp_path / "large.vrt", dem(bands), changes)
    check(blurred(vrt, 3), bands, valid, window=3)


@pytest.mark.parametrize("nodata", [0.1, 1e39])
def test_nodata_is_rounded_as_the_pixels_of_its_band(nodata, blurred, dem, tmp_path):
    """Also where a band of another type makes the means float64. 1e39 is no float32."""
    bands = HEIGHTS.repeat(2, 0)
    bands[0, 20, 30] = 0.1
    valid = np.ones(bands.shape, bool)
    valid[0, 20, 30] = nodata != 0.1
    sources = dem(bands[:1]), tmp_path / "double.tif"
    write_raster(sources[1], bands[1:].astype(np.float64))
    vrt = stack_files(tmp_path / "both.vrt", "-vrtnodata", str(nodata), *sources)
    check(blurred(vrt), bands, valid)
