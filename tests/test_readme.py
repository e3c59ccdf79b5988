"""README's commands are run in the order shown, and what it quotes is compared."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import rowcol
from scipy import ndimage
from tools import (
    ROOT,
    SIMPLE,
    brute_force,
    check_silent,
    copy_tracked,
    need,
    read,
    sees_memory,
    wait_until,
    write_raster,
)

README = (ROOT / "README.md").read_text()
# A block: its language, a note behind it, its text. Or a command within a sentence: a
# program with what it is told, variables in front.
PROGRAM = "bash|cat|gdal[\\w.]*|git|module|rsync|sacct|sbatch|scancel|scontrol|sed|seff"
PROGRAM += "|sinfo|source|squeue|sudo|tail"
PATTERN = rf"^```(\w+)([^\n]*)\n(.*?)^```$|`((?:[A-Z_]+=\S+ )*(?:{PROGRAM})\s[^`]+)`"
PARTS = [m.groups("") for m in re.finditer(PATTERN, README, re.MULTILINE | re.DOTALL)]
BLOCKS = [(language, note.strip(), text) for language, note, text, _ in PARTS]
ELSEWHERE = {  # how a command on the page starts that is not run, and why
    "git clone": "it is done, as copy_tracked",
    "sudo apt-get": "it is done, see tests/run.sh",
    "source .venv": "it is done, as PATH says",
    "bash tests/run.sh": "it runs this page",
    "sbatch --account": "only Roihu has the account and the partition",
    "seff": "no package of Debian has it that slurm-wlm needs",
    "rsync": "it is for two computers",
}
INSTEAD = {  # what is run in place of a command
    "tail -f out.txt": "timeout 1 tail -f out.txt || [ $? = 124 ]",
    "module avail": "bash -lc 'module avail'",
}
# Slurm's shortest limit is a minute, but the end of a job can be moved.
HURRY = "until scontrol update jobname=wrap endtime=now+1; do sleep 0.1; done"
RECIPES = README[README.index("## Sheets that touch") : README.index("## Your own")]


def blank(text):
    """Take out of a text what differs from run to run: seconds, bytes, but no job's number.

    And from Slurm to Slurm: which of its programs tells an error.
    """
    text = re.sub(r"(?m)^\S+ (?=error: )", "", text)
    if "MaxRSS" in text:  # a table of sacct
        text = re.sub(r" +", " ", re.sub(r"\d[\d:.]*\d[KM]?", "N", text))
    text = re.sub(r"\d+\.\d seconds", "N seconds", text)
    # It says which result it replaces, if the page's commands have made one before.
    text = re.sub(", in place of an earlier result of window [0-9]+ x [0-9]+", "", text)
    text = re.sub(r"needs some \d+ MB|mem-per-cpu=\d+ [.]", "N", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:]+|\(\d+ >|\bc\d\b", "N", text)
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
    """Check that the three ways have led to the same means, in files; return them."""
    with rasterio.open(folder / "smooth/all.tif") as mosaic:
        means, place = mosaic.read(1), mosaic.transform
    assert np.isfinite(means[7:-7, 7:-7]).all()
    for name, margin in ("joined.tif", 7), ("joined_parts.tif", 0):
        with rasterio.open(folder / name) as joined:
            assert joined.files == [joined.name]
            assert joined.shape == tuple(np.add(means.shape, 2 * margin))
            row, column = rowcol(joined.transform, place.c, place.f, op=round)
            values = joined.read(1)[row : row + len(means)]
        values = values[:, column : column + means.shape[1]]
        assert values.tobytes() == means.tobytes()
    return means


def test_commands_in_their_order(cluster, tmp_path):
    """Cluster is not used, but where it cannot start, README's cannot either."""
    need("gdalbuildvrt", "slurmdbd", "mariadbd")
    folder = copy_tracked(tmp_path / "checkout")
    path = f"{folder}/.venv/bin:{os.environ['PATH']}"  # as after activate
    short = tempfile.mkdtemp(dir="/tmp")  # for Slurm
    environment = os.environ | {"PATH": path, "TMPDIR": short}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "HOME": str(tmp_path)}
    command = output = ""
    try:
        for language, note, text, within in PARTS:
            if language == "text":
                if re.search("memory limit|MaxRSS", text) and not sees_memory(
                    environment
                ):
                    continue
                for _ in range(50 * ("sacct" in command)):  # the records come late
                    if blank(output) != blank(text):
                        time.sleep(0.2)
                        output = type_in(command, folder, environment)
                assert blank(output) == blank(text)
            elif within or language == "bash":
                command = " ".join(within.split()) or text
                command = INSTEAD.get(command, command)
                command = command.replace("/path/to/clone", str(folder))
                if "sleep 3600" in command:
                    command = f"({HURRY}) &>/dev/null &\n{command}"
                if not command.startswith(tuple(ELSEWHERE)):
                    output = type_in(command, folder, environment)
            if "start.sh" in text:
                environment |= dict(re.findall(r"export (\w+)=(.*)", output))
                stop = output.splitlines()[-1]
        assert "lines 3-4" in (folder / "array_job_out_6_2.txt").read_text()
        tasks = "sacct -nXj 6 --format=JobID,JobIDRaw"
        assert type_in(tasks, folder, environment).split() == ["6_1", "7", "6_2", "6"]
        check_seamless(folder)
        check_smaller(folder / "smaller.tif", folder / "smooth/jacksboro.tif")
        assert rasterio.open(folder / "sheet.tif").nodata == -9999
        project = tmp_path / "project"
        copy_tracked(project / "own")
        (project / "list.txt").write_text("own/tests/data/jacksboro_se.tif\n")
        for job in (
            "batch_job_simple.sh own/tests/data/jacksboro.vrt 3",
            "batch_job_multiprocessing.sh own/tests/data/jacksboro_nw.tif 3",
            "--array=1 array_job.sh list.txt 3",
        ):
            type_in(f"sbatch --wait {job}", project, environment)
        assert {path.stem[10:] for path in project.glob("smooth/*")} == {"", "se", "nw"}
        stop += "; echo ${SLURM_CONF-} ${MODULEPATH-}"
        assert type_in(stop, folder, environment).strip() == ""
    finally:
        for place in Path(short).glob("slurm.*"):
            subprocess.run(["bash", ROOT / "tests/slurm/stop.sh", place], check=False)
        os.rmdir(short)


def test_seamless_result_from_sheets_of_ones_own(cluster, tmp_path):
    """Without nodata, in a folder with a space in its name, with pixels of 2 m."""
    need("gdalbuildvrt")
    folder = copy_tracked(tmp_path / "checkout")
    environment = cluster | {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "my maps").mkdir()
    values = np.random.default_rng(0).integers(1, 900, (1, 200, 300), np.int16)
    for name, row, column in ("a", 0, 0), ("b", 0, 160), ("c", 90, 0), ("d.e", 90, 160):
        part = values[:, row : row + row // 9 * 2 + 90, column : column + 160]
        place = rasterio.Affine(2, 0, 500000 + 2 * column, 0, -2, 7000000 - 2 * row)
        write_raster(folder / "my maps" / f"{name}.tif", part, transform=place)
    type_in('ls "my maps"/*.tif > mapsheets.txt', folder, environment)
    recipes = RECIPES.replace("7 / 1200", "7 * 2")
    recipes = recipes.replace("=403 rows=344 part=172", "=300 rows=200 part=60")
    for match in re.finditer(PATTERN, recipes, re.MULTILINE | re.DOTALL):
        type_in(match[3] or "", folder, environment)
    means = check_seamless(folder)
    kernel = np.full((15, 15), 1 / 225)
    expected = ndimage.convolve(values[0].astype(float), kernel)[7:-7, 7:-7]
    np.testing.assert_allclose(means[7:-7, 7:-7], expected, rtol=1e-5)
    assert np.isnan(means).sum() == means.size - expected.size


@pytest.mark.parametrize(
    ("note", "text"), [(note, text) for _, note, text in BLOCKS if note[:5] == "from "]
)
def test_excerpts_are_in_their_files(note, text):
    assert text in (ROOT / note.removeprefix("from ")).read_text()


def check_smaller(smaller, path):
    """Check that a compressed raster is the other, with -9999 in place of NaN."""
    with rasterio.open(smaller) as small, rasterio.open(path) as result:
        means = result.read()
        np.testing.assert_array_equal(
            small.read(), np.where(np.isnan(means), -9999, means)
        )
        assert (small.nodata, small.crs) == (-9999, result.crs)
        assert small.transform.almost_equals(result.transform, 1e-12)
    assert smaller.stat().st_size < 0.6 * path.stat().st_size


def test_reasons_why_jobs_wait(cluster, tmp_path):
    """All but AssocGrp..., as this Slurm does not enforce limits of projects."""
    submit = ["sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 600"]

    def see(options, reason):
        job = subprocess.check_output([*submit, *options], env=cluster, text=True)
        jobs.append(job.strip())
        show = ["squeue", "--noheader", "--format=%r", f"--jobs={jobs[-1]}"]
        wait_until(
            lambda: reason in subprocess.check_output(show, env=cluster, text=True)
        )

    jobs = []
    try:
        for _ in range(3):
            see(["--exclusive", "--mem-per-cpu=100", "--time=20"], "None")
        see(["--cpus-per-task=16", "--mem-per-cpu=100", "--time=20"], "Resources")
        see(["--time=20"], "Priority")
        see(["--time=4-0"], "PartitionTimeLimit")
        see(["--begin=now+1hour"], "BeginTime")
    finally:
        subprocess.run(["scancel", *jobs], env=cluster, check=True)
    words = README[README.index("**A job that waits**") :]
    shown = re.findall(r"`(\w+)`", words[: words.index("AssocGrp")])
    assert {"Resources", "Priority", "PartitionTimeLimit", "BeginTime"} <= set(shown)


def test_programs_do_not_know_where_slurm_is(cluster):
    """Without the two lines that start.sh prints, they say what the page says."""
    if Path("/etc/slurm/slurm.conf").exists():
        pytest.skip("this computer has a Slurm that needs no such lines")
    without = {k: v for k, v in cluster.items() if k != "SLURM_CONF"}
    words = re.search(r"or each command\ssays `(\w+)`", README)[1]
    for program in ("sbatch", "squeue", "scancel", "sacct"):
        done = subprocess.run(
            [program, "1"], env=without, capture_output=True, text=True, check=False
        )
        assert words in done.stderr, done


def test_other_kernel_is_a_gaussian(tmp_path):
    """As the page says: one that is the product of a row and a column."""
    lines = """
    weights = np.exp(-(np.linspace(-2, 2, window) ** 2) / 2)
    weights = weights / weights.sum()
"""
    old = SIMPLE.read_text()
    (line,) = re.findall(r"^    weights = .*\n", old, re.MULTILINE)
    (tmp_path / "gaussian.py").write_text(old.replace(line, lines))
    spec = importlib.util.spec_from_file_location("gaussian", tmp_path / "gaussian.py")
    gaussian = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gaussian)
    values = np.random.default_rng(1).random((1, 50, 60))
    expected = ndimage.gaussian_filter(values[0], 14 / 4, radius=7, mode="constant")
    gaussian.average(values, 15, axis=1)
    gaussian.average(values, 15, axis=2)
    inside = np.s_[7:-7, 7:-7]
    np.testing.assert_allclose(values[0][inside], expected[inside], rtol=1e-9)


def test_pictures_can_be_drawn_again(tmp_path):
    script = ROOT / "tests/pictures/make_pictures.py"
    subprocess.run([sys.executable, script, tmp_path], check=True)
    kept = {picture.name for picture in script.parent.glob("*.png")}
    assert {picture.name for picture in tmp_path.iterdir()} == kept
    assert all(f"tests/pictures/{name}" in README for name in kept)


def test_page_is_short_and_its_links_work():
    assert len(README.split()) <= 2300
    assert max(map(len, README.splitlines())) <= 100
    assert README.count("\n") <= 300
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    for link in re.findall(r"\]\(([^)]+)\)", README):
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("http"):
            assert (ROOT / link).exists(), link


# How sheets tell which of their pixels are invalid; not all sheets of a list are alike.
KINDS = [
    # what gdalbuildvrt is told, whether that is right, type, sheets
    ("-vrtnodata -32768", True, "int16", ["nodata", "nothing", "inside", "beside"]),
    ("-vrtnodata -32768", True, "int16", ["nothing", "nodata"]),
    ("-vrtnodata -32768", True, "int16", ["inside", "nothing"]),
    ("-vrtnodata -32768", True, "float32", ["nan", "nodata"]),
    ("-vrtnodata -32768", True, "float32", ["undeclared nan"]),
    ("-addalpha", True, "uint8", ["nothing"]),
    ("-addalpha", True, "uint16", ["nothing"]),
    ("-addalpha", True, "uint8", ["nodata"]),
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
    """Three sheets and a gap, in each of the three ways, with the option for their kind."""
    need("gdalbuildvrt")
    line = "gdalbuildvrt -q -vrtnodata -32768 -input_file_list mapsheets.txt all.vrt\n"
    assert line in README
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
    commands = f"""ls ?.tif > mapsheets.txt
        {line.replace("-vrtnodata -32768", option)}
        gdalbuildvrt -q -te -8 -88 128 8 wider.vrt all.vrt
        gdal_translate -q -of VRT -srcwin 0 6 60 30 all.vrt part.vrt"""
    type_in(commands, tmp_path, os.environ)
    expected = brute_force(values, valid, 5)
    wider = np.pad(expected, ((0, 0), (4, 4), (4, 4)), constant_values=np.nan)
    part = brute_force(values[:, 6:36], valid[:, 6:36], 5)
    same = []
    for name, means in ("all", expected), ("wider", wider), ("part", part):
        check_silent(run_fast(SIMPLE, f"{name}.vrt", 5, cwd=tmp_path))
        found = read(tmp_path / "smooth" / f"{name}.tif")
        same.append(np.allclose(found, means, rtol=1e-5, equal_nan=True))
    assert np.isfinite(expected).any()
    assert same == [True] * 3 if right else not any(same)
