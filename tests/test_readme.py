"""README's commands are run in the order shown, and what it quotes is compared."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
import runs
from rasters import brute_force, read, write_netcdf, write_raster
from runs import ROOT, SIMPLE, blur, check_silent, need, run
from scipy import ndimage
from scipy.io import netcdf_file

README = (ROOT / "README.md").read_text()
# The Slurm to try it on is started where the page leads to it.
BEFORE, MIDDLE, START = re.split(r"(?=## Batch job|## A Slurm to try)", README)
# A block: its language, a note behind it, its text. Or a command within a sentence: a
# program with what it is told.
PROGRAM = "bash|cat|gdal[\\w.]*|git|module|sacct|sbatch|scancel|sinfo|source|squeue"
PROGRAM += "|seff|sudo"
PATTERN = rf"^```(\w+)([^\n]*)\n(.*?)^```$|`((?:{PROGRAM})\s[^`]+)`"
PARTS = [
    match.groups("")
    for match in re.finditer(PATTERN, BEFORE + START + MIDDLE, re.MULTILINE | re.DOTALL)
]
# What commands that are not run begin with. They are done (in copy_tracked, run.sh and by
# PATH), run this page, tell of the reader's own module, account or raster, or have a test.
ELSEWHERE = "git clone", "sudo apt-get", "source .venv", "bash tests/run.sh"
ELSEWHERE += "module load", "export SBATCH", "sbatch --time=00:10:00"
ELSEWHERE += "gdal_edit.py -colorinterp", "gdal_calc.py"


def blank(text):
    """Take out of a text what differs from run to run: seconds, bytes, but no job's number.

    And from Slurm to Slurm: which of its programs tells an error.
    """
    text = re.sub(r"(?m)^\S+ (?=error: )", "", text)
    if "MaxRSS" in text or "Efficiency" in text:  # of sacct or seff
        text = re.sub(r"(?m)^User/Group: .*", "", text)
        text = re.sub(r" +", " ", re.sub(r"\d[\d:.]*[KM]?", "N", text))
    text = re.sub(r"mem-per-cpu=\d+|\(\d+ >|\bc\d\b", "N", text)
    return [line.strip() for line in text.strip().splitlines()]


def type_in(command, folder, environment):
    """Run a command as a user would, and wait for its jobs; return what it printed."""
    done = run("bash", "-c", command, cwd=folder, env=environment, timeout=300)
    assert done.returncode == command.startswith("diff"), (command, done)
    if "Submitted" in done.stdout:
        queue = ["squeue", "--noheader"]
        runs.wait_until(lambda: not subprocess.check_output(queue, env=environment))
    for log in folder.glob("array_job_err_*.txt"):
        assert log.read_text() == "", command
    return done.stdout


def prepare(command, folder, project):
    """Bring the reader's own data, and what a command mends; return where it is typed."""
    if command.startswith("gdalinfo x.nc"):
        write_netcdf(folder / "x.nc")
    if "gdalinfo -mm" in command:
        shutil.copytree(folder / "tests/data", project / "maps")
    if "missing.txt" in command:
        (project / "smooth/jacksboro_sw.tif").unlink()
    return project if re.search(r"maps/|mymaps|all\.vrt", command) else folder


def test_commands_in_their_order(cluster, tmp_path):
    """Cluster is not used, but where it cannot start, README's cannot either."""
    need("gdalbuildvrt")
    folder, project = runs.copy_tracked(tmp_path / "checkout"), tmp_path / "project"
    path = f"{folder}/.venv/bin:{os.environ['PATH']}"  # as after activate
    short = tempfile.mkdtemp(dir="/tmp")  # for Slurm
    environment = os.environ | {"PATH": path, "TMPDIR": short}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "HOME": str(tmp_path)}
    command = output = ""
    has_seff = False
    try:
        for language, note, text, within in PARTS:
            if language == "text":
                if command.startswith("seff") and not has_seff:
                    continue
                for _ in range(50 * bool(re.search("sacct|seff", command))):  # late
                    if blank(output) != blank(text):
                        time.sleep(0.2)
                        output = type_in(command, folder, environment)
                memory = re.search("memory limit|MaxRSS|Efficiency", text)
                if not memory or runs.sees_memory(environment):
                    assert blank(output) == blank(text)
            elif within or language == "bash":
                command = " ".join(within.split()) or text
                command = re.sub("^module avail$", "bash -lc 'module avail'", command)
                command = command.replace("/path/to/clone", str(folder))
                place = prepare(command, folder, project)
                if "get_seff" in command:  # it needs a mirror with Slurm's source
                    done = run("bash", "-c", command, cwd=place, env=environment)
                    has_seff = done.returncode == 0
                    print(done.stderr)
                elif command.startswith("seff") and not has_seff:
                    continue
                elif not command.startswith(ELSEWHERE):
                    output = type_in(command, place, environment)
                    print(f"$ {command}\n{output}")
            if "start.sh" in text:  # before that, programs say what the page says
                words = re.search(r"of\s+Slurm\s+says\s+`(\w+)`", README)[1]
                assert words in subprocess.getoutput("squeue")
                environment |= dict(re.findall(r"export (\w+)=(.*)", output))
                stop = output.splitlines()[-1]
        means, joined = read(project / "smooth/all.tif"), project / "joined.tif"
        expected = brute_force(read(project / "all.vrt"), True, 15)
        np.testing.assert_allclose(means, expected, rtol=1e-5, equal_nan=True)
        with rasterio.open(joined) as file, rasterio.open(project / "all.vrt") as vrt:
            assert file.read().tobytes() == means.tobytes()  # of parts with halos
            assert file.transform.almost_equals(vrt.transform, 1e-9)
            assert file.files == [str(joined)]
        assert (project / "missing.txt").read_text() == "maps/jacksboro_sw.tif\n"
        assert (project / "smooth/jacksboro_sw.tif").exists()
        assert rasterio.open(project / "maps/jacksboro_sw.tif").nodata == -9999
        type_in("python simple_focal_mean.py netcdf:x.nc:red", folder, environment)
        assert (folder / "smooth/netcdf_x.nc_red.tif").exists()
        stop += "; echo ${SLURM_CONF-} ${MODULEPATH-}"
        assert type_in(stop, folder, environment).strip() == ""
    finally:
        for place in Path(short).glob("slurm.*"):
            subprocess.run(["bash", ROOT / "tests/slurm/stop.sh", place], check=False)
        os.rmdir(short)


def test_page_quotes_what_is_there_is_short_and_its_links_work():
    for _, note, text, _ in PARTS:
        assert not note or text in (ROOT / note.removeprefix(" from ")).read_text()
    lines = [line for line in README.splitlines() if "](http" not in line]
    assert all(len(line) <= 100 or line.startswith("|") for line in lines)
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert link.startswith("http") or link[1:] in anchors or (ROOT / link).exists()


ASKED = {  # in README's table of what to ask for, and in the benchmark's
    "sheet, 3000 x 3000 pixels": ("sheet", "simple", "15"),
    "10980 x 2048 x 12 bands": ("stack", "multiprocessing 2", "15"),
    "12000 x 12000 pixels": ("plain", "multiprocessing 2", "15"),
}


def test_numbers_of_the_page_are_those_of_the_benchmark():
    text = (ROOT / "tests/benchmark.md").read_text()
    row = r"(?m)^\| (\w+).tif [^|]+ \| (.+?) \| (\d+) \| \d+ \| (\S+) \| (\S*) "
    row += r"\| .* \| (\d+) MB \| \d+ MB \|$"
    rows = {cells[:3]: cells[3:] for cells in re.findall(row, text)}
    times = {case: f"{float(cells[0]):.1f}" for case, cells in rows.items()}
    for words, case in ASKED.items():
        found = re.search(rf"{words} \| (\d) \| (\S+) \| (\d+)", README)
        cpus, seconds, memory = found.groups()
        assert case[1] in ("simple", f"multiprocessing {cpus}")
        assert seconds == times[case]
        rss = int(rows[case][2]) / int(cpus)
        assert rss <= int(memory) <= 1.2 * rss
    ruled = [(seconds, rule) for seconds, rule, _ in rows.values() if rule]
    assert ruled and all(float(seconds) <= float(rule) for seconds, rule in ruled)
    page = " ".join(README.split())
    programs = "2-D", "simple", "copy"
    slow, fast, start = (times["sheet", program, "15"] for program in programs)
    assert f"that is {slow} seconds instead of {fast}. ({start} seconds of both" in page
    one, two = times["plain", "simple", "15"], times["plain", "multiprocessing 2", "15"]
    assert f"12000 x 12000 pixels: {one} s |" in page
    assert f"the same with 2 CPUs: {two} s |" in page


def test_other_filters(tmp_path, run_fast):
    """The page's lines make a Gaussian; scipy's uniform_filter loses the rest of a line."""
    line = np.where(np.arange(60) == 20, np.nan, 1)
    assert np.isnan(ndimage.uniform_filter(line, 5)[18:]).all()
    (weights,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (line,) = re.findall(r"(?m)^    weights = .*\n", SIMPLE.read_text())
    values = np.random.default_rng(1).random((2, 50, 60))
    raster = write_raster(tmp_path / "dem.tif", values)
    check_silent(run_fast(SIMPLE, raster, cwd=tmp_path, changes={line: weights}))
    found = read(tmp_path / "smooth/dem.tif")
    expected = ndimage.gaussian_filter(values, (0, 14 / 4, 14 / 4), radius=(0, 7, 7))
    inner = np.s_[:, 7:-7, 7:-7]
    np.testing.assert_allclose(found[inner], expected[inner], rtol=1e-9)


def test_files_of_other_people(tmp_path):
    """What the page's table says of netCDF, four bands, and pages, is so."""
    need("gdal_edit.py")
    four, pages, netcdf = (tmp_path / name for name in ("four.tif", "x.tif", "x.nc"))
    values = np.full((4, 20, 20), 9, np.uint8)
    write_raster(four, values)
    assert "3 bands" in run(sys.executable, SIMPLE, four, "3", cwd=tmp_path).stdout
    (option,) = re.findall(r"gdal_edit.py (-colorinterp.*?) x.tif`", README)
    check_silent(run("gdal_edit.py", *option.split(), four))
    assert "4 bands" in run(sys.executable, SIMPLE, four, "3", cwd=tmp_path).stdout
    write_raster(pages, values[:1])
    write_raster(pages, values[:1] + 1, APPEND_SUBDATASET="YES")
    (second,) = re.findall(r"`(GTIFF_DIR:2:.*?)`", README)
    means = [read(blur(SIMPLE, name, 3, cwd=tmp_path)) for name in (pages, second)]
    assert [mean[0, 5, 5] for mean in means] == [9, 10]
    with netcdf_file(write_netcdf(netcdf), "a") as file:
        red = file.variables["red"]
        red.missing_value, red._FillValue = np.float32(-999), np.float32(-888)
        red[:2, 0] = -999, -888
    assert rasterio.open(f"netcdf:{netcdf}:red").nodata == -888
    (command,) = re.findall(r"`(gdal_calc.py .*?)`", README)
    type_in(command, tmp_path, os.environ)
    assert (rasterio.open(tmp_path / "red.tif").read_masks(1) == 0).sum() == 2


def test_pictures_can_be_drawn_again(tmp_path):
    script = ROOT / "tests/pictures/make_pictures.py"
    subprocess.run([sys.executable, script, tmp_path], check=True)
    kept = {picture.name for picture in script.parent.glob("*.png")}
    assert {picture.name for picture in tmp_path.iterdir()} == kept
    assert all(f"tests/pictures/{name}" in README for name in kept)


KINDS = [("-vrtnodata -32768", "int16", how) for how in ("nodata", "inside")]
KINDS += [("-vrtnodata -32768", "float32", "nodata"), ("-addalpha", "uint8", "nodata")]
KINDS += [("-addalpha", "uint32", ""), ("", "uint16", "beside")]
KINDS += [("", dtype, "inside") for dtype in ("uint8", "int16")]


@pytest.mark.parametrize("option, dtype, how", KINDS)
def test_pixels_that_no_sheet_covers(tmp_path, run_fast, option, dtype, how):
    """Three sheets and a gap: with the page's option for how the sheets mark invalid pixels.

    The first does by nodata, a mask inside or beside the file, or not at all; the others
    have no invalid pixels. A part of the rows and columns is blurred likewise.
    """
    need("gdalbuildvrt")
    rng = np.random.default_rng(0)
    values = rng.integers(0, 250, (1, 40, 60)).astype(dtype)
    valid = np.ones(values.shape, bool)
    valid[:, 20:, 30:] = False  # the gap
    for number, (row, column) in enumerate([(0, 0), (0, 30), (20, 0)]):
        part = np.s_[:, row : row + 20, column : column + 30]
        if number == 0 and how:
            valid[part] = rng.random((1, 20, 30)) > 0.01
        sheet = tmp_path / f"{number}.tif"
        place = rasterio.Affine(2, 0, 2 * column, 0, -2, -2 * row)
        nodata = 255 if number == 0 and how == "nodata" else None
        pixels = np.where(valid[part], values[part], 255).astype(dtype)
        masked = valid[part][0] if how in ("inside", "beside") else None
        kind = {"nodata": nodata, "mask": masked, "inside": how == "inside"}
        write_raster(sheet, pixels, transform=place, **kind)
    (line,) = re.findall(r"^gdalbuildvrt .*-vrtnodata.*\n", README, re.MULTILINE)
    commands = f"""ls ?.tif > list.txt; list=list.txt
        {line.replace("-vrtnodata -32768", option)}
        gdal_translate -q -of VRT -srcwin 0 6 60 30 all.vrt part.vrt"""
    type_in(commands, tmp_path, os.environ)
    for name, rows in ("all", np.s_[:, :]), ("part", np.s_[:, 6:36]):
        check_silent(run_fast(SIMPLE, f"{name}.vrt", 5, cwd=tmp_path))
        expected = brute_force(values[rows], valid[rows], 5)
        found = read(tmp_path / f"smooth/{name}.tif")
        np.testing.assert_allclose(found, expected, rtol=1e-5, equal_nan=True)
