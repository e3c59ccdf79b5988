"""README's commands are run in the order shown, and what it quotes is compared."""

import importlib.util
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
from rasters import brute_force, read, write_netcdf, write_raster
from runs import ROOT, SIMPLE, check_silent, copy_tracked, need, sees_memory, wait_until
from scipy import ndimage

README = (ROOT / "README.md").read_text()
# The Slurm to try it on is started where the page leads to it.
BEFORE, MIDDLE, START = re.split(r"(?=## Batch job|## A Slurm to try)", README)
# A block: its language, a note behind it, its text. Or a command within a sentence: a
# program with what it is told.
PROGRAM = "bash|cat|gdal[\\w.]*|git|module|sacct|sbatch|scancel|sinfo|source|squeue"
PROGRAM += "|sudo|tail"
PATTERN = rf"^```(\w+)([^\n]*)\n(.*?)^```$|`((?:{PROGRAM})\s[^`]+)`"
PARTS = [
    match.groups("")
    for match in re.finditer(PATTERN, BEFORE + START + MIDDLE, re.MULTILINE | re.DOTALL)
]
ELSEWHERE = {  # how a command on the page starts that is not run, and why
    "git clone": "it is done, as copy_tracked",
    "sudo apt-get": "it is done, see tests/run.sh",
    "source .venv": "it is done, as PATH says",
    "bash tests/run.sh": "it runs this page",
    "sbatch --account": "only Roihu has the account and the partition",
    "sbatch batch_job_simple.sh dem.tif": "the reader's own raster",
    "sbatch batch_job_multiprocessing.sh dem.tif": "the reader's own raster",
}
INSTEAD = {  # what is run in place of a command
    "tail -f out.txt": "timeout 1 tail -f out.txt || [ $? = 124 ]",
    "module avail": "bash -lc 'module avail'",
}


def blank(text):
    """Take out of a text what differs from run to run: seconds, bytes, but no job's number.

    And from Slurm to Slurm: which of its programs tells an error.
    """
    text = re.sub(r"(?m)^\S+ (?=error: )", "", text)
    if "MaxRSS" in text:  # a table of sacct
        text = re.sub(r" +", " ", re.sub(r"\d[\d:.]*\d[KM]?", "N", text))
    text = re.sub(r"mem-per-cpu=\d+|\(\d+ >|\bc\d\b", "N", text)
    return [line.strip() for line in text.strip().splitlines()]


def type_in(command, folder, environment):
    """Run a command as a user would, and wait for its jobs; return what it printed."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (command, done)
    if "Submitted" in done.stdout:
        queue = ["squeue", "--noheader"]
        wait_until(lambda: not subprocess.check_output(queue, env=environment))
    for log in folder.glob("array_job_err_*.txt"):
        assert log.read_text() == "", command
    return done.stdout


def check_seamless(folder):
    """Check that both ways over seams have led to the same means; return them."""
    means, joined = read(folder / "smooth/all.tif"), folder / "joined.tif"
    assert np.isfinite(means[:, 7:-7, 7:-7]).all()
    assert read(joined).tobytes() == means.tobytes()
    with rasterio.open(joined) as file, rasterio.open(folder / "all.vrt") as mosaic:
        assert file.files == [file.name]
        assert file.transform.almost_equals(mosaic.transform, 1e-9)
    return means[0]


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
    need("gdalbuildvrt", "slurmdbd", "mariadbd")
    folder, project = copy_tracked(tmp_path / "checkout"), tmp_path / "project"
    path = f"{folder}/.venv/bin:{os.environ['PATH']}"  # as after activate
    short = tempfile.mkdtemp(dir="/tmp")  # for Slurm
    environment = os.environ | {"PATH": path, "TMPDIR": short}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "HOME": str(tmp_path)}
    command = output = ""
    try:
        for language, note, text, within in PARTS:
            if language == "text":
                for _ in range(50 * ("sacct" in command)):  # the records come late
                    if blank(output) != blank(text):
                        time.sleep(0.2)
                        output = type_in(command, folder, environment)
                memory = re.search("memory limit|MaxRSS", text)
                if not memory or sees_memory(environment):
                    assert blank(output) == blank(text)
            elif within or language == "bash":
                command = " ".join(within.split()) or text
                command = INSTEAD.get(command, command)
                command = command.replace("/path/to/clone", str(folder))
                place = prepare(command, folder, project)
                if not command.startswith(tuple(ELSEWHERE)):
                    output = type_in(command, place, environment)
            if "start.sh" in text:  # before that, programs say what the page says
                words = re.search(r"or each command\ssays `(\w+)`", README)[1]
                assert words in subprocess.getoutput("squeue")
                environment |= dict(re.findall(r"export (\w+)=(.*)", output))
                stop = output.splitlines()[-1]
        assert "lines 3-4" in (folder / "array_job_out_5_2.txt").read_text()
        check_seamless(project)
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
    assert len(README.split()) <= 1750
    assert max(map(len, README.splitlines())) <= 100
    assert README.count("\n") <= 230
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert link.startswith("http") or link[1:] in anchors or (ROOT / link).exists()


@pytest.mark.parametrize(
    ("size", "program"),
    [
        ("3000 x 3000", "simple"),
        ("10980 x 2048 x 12", "multiprocessing 2"),
        ("12000 x 12000", "multiprocessing 4"),
    ],
)
def test_what_to_ask_for_is_what_the_benchmark_measured(size, program):
    cells = (
        rf"\| (?:sheet|stack|plain).tif {size}(?: x 1)? \| {program} \| 15 \| (.*) \|"
    )
    measured = re.search(cells, (ROOT / "tests/benchmark.md").read_text())[1].split("|")
    seconds, rss = float(measured[3]), float(measured[6].split()[0])
    cpus, told, memory = re.search(
        rf"{size}\D* \| (\d) \| (\d+) \| (\d+)", README
    ).groups()
    assert program.endswith(cpus) or (program, cpus) == ("simple", "1")
    assert seconds <= int(told) <= seconds + 1
    assert rss / int(cpus) <= int(memory) <= 1.2 * rss / int(cpus)


def test_other_weights_are_a_gaussian(tmp_path):
    lines = """
    weights, halo = np.exp(-(np.linspace(-2, 2, window) ** 2) / 2), window // 2
    weights = weights / weights.sum()
"""
    old = SIMPLE.read_text()
    (line,) = re.findall(r"^    weights, halo = .*\n", old, re.MULTILINE)
    (tmp_path / "gaussian.py").write_text(old.replace(line, lines))
    spec = importlib.util.spec_from_file_location("gaussian", tmp_path / "gaussian.py")
    gaussian = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gaussian)
    values = np.random.default_rng(1).random((50, 60))
    expected = ndimage.gaussian_filter(values, 14 / 4, radius=7, mode="constant")
    means = gaussian.average(values, 15)
    np.testing.assert_allclose(means[:, 7:-7], expected[7:-7, 7:-7], rtol=1e-9)


def test_pictures_can_be_drawn_again(tmp_path):
    script = ROOT / "tests/pictures/make_pictures.py"
    subprocess.run([sys.executable, script, tmp_path], check=True)
    kept = {picture.name for picture in script.parent.glob("*.png")}
    assert {picture.name for picture in tmp_path.iterdir()} == kept
    assert all(f"tests/pictures/{name}" in README for name in kept)


# How sheets tell which of their pixels are invalid; not all sheets of a list are alike.
KINDS = [
    # what gdalbuildvrt is told, whether that is right, type, sheets
    ("-vrtnodata -32768", True, "int16", ["nodata", "nothing", "inside", "beside"]),
    ("-vrtnodata -32768", True, "int16", ["inside", "nothing", "nodata"]),
    ("-vrtnodata -32768", True, "float32", ["nan", "nodata", "undeclared nan"]),
    ("-addalpha", True, "uint16", ["nothing"]),
    ("-addalpha", True, "uint8", ["nodata", "nothing"]),
    ("", True, "uint8", ["inside", "nothing"]),
    ("", True, "uint16", ["beside"]),
    ("", True, "uint8", ["alpha"]),
    # Were these right, the page would say too much.
    ("", False, "int16", ["nothing"]),
    ("-vrtnodata -32768", False, "uint8", ["nothing"]),
    ("-addalpha", False, "int16", ["nothing", "nodata"]),
]


def write_sheet(path, values, valid, how, **profile):
    """Write a sheet some of whose pixels are not valid; return which then are."""
    if how == "nothing":
        valid = np.full_like(valid, True)
    elif how == "alpha":
        values = np.concatenate([values, 255 * valid]).astype(values.dtype)
        profile |= {"photometric": "minisblack", "alpha": "yes"}
    elif how in ("nodata", "nan"):
        profile["nodata"] = 255 if how == "nodata" else np.nan
    if how in ("nodata", "nan", "undeclared nan"):
        hidden = 255 if how == "nodata" else np.nan
        values = np.where(valid, values, np.array(hidden, values.dtype))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=how == "inside"):
        write_raster(path, values, **profile)
        if how in ("inside", "beside"):
            with rasterio.open(path, "r+") as sheet:
                sheet.write_mask(valid[0])
    return valid


@pytest.mark.parametrize(("option", "right", "dtype", "sheets"), KINDS)
def test_pixels_that_no_sheet_covers(tmp_path, run_fast, option, right, dtype, sheets):
    """Three sheets and a gap, in both ways, with the option for their kind."""
    need("gdalbuildvrt")
    (line,) = re.findall(r"^gdalbuildvrt .*-vrtnodata.*\n", README, re.MULTILINE)
    rng = np.random.default_rng(0)
    values = rng.integers(0, 250, (1, 40, 60)).astype(dtype)
    valid = rng.random(values.shape) > 0.01
    valid[:, 20:, 30:] = False  # the gap
    for number, (row, column) in enumerate([(0, 0), (0, 30), (20, 0)]):
        part = np.s_[:, row : row + 20, column : column + 30]
        how = sheets[number % len(sheets)]
        place = rasterio.Affine(2, 0, 2 * column, 0, -2, -2 * row)
        path = tmp_path / f"{number}.tif"
        valid[part] = write_sheet(path, values[part], valid[part], how, transform=place)
    commands = f"""ls ?.tif > list.txt; list=list.txt
        {line.replace("-vrtnodata -32768", option)}
        gdal_translate -q -of VRT -srcwin 0 6 60 30 all.vrt part.vrt"""
    type_in(commands, tmp_path, os.environ)
    expected = brute_force(values, valid, 5)
    part = brute_force(values[:, 6:36], valid[:, 6:36], 5)
    same = []
    for name, means in ("all", expected), ("part", part):
        check_silent(run_fast(SIMPLE, f"{name}.vrt", 5, cwd=tmp_path))
        found = read(tmp_path / "smooth" / f"{name}.tif")
        same.append(np.allclose(found, means, rtol=1e-5, equal_nan=True))
    assert np.isfinite(expected).any()
    assert same == [True] * 2 if right else not any(same)
