"""The memory that a run takes, as Slurm counts it, is what it tells to ask for."""

import os
import re
import sys

import pytest
from benchmark import choose_cases, peak_memory, tiles
from rasters import write_zeros
from runs import MULTI, ROOT, SIMPLE, check_silent, run

MB = 1.048576  # a MB for Slurm, which counts 2^20 bytes, in 10^6 bytes


def peak_of(script, raster, window, cpus=1):
    """Return the most MB that each CPU takes, and what the run tells to ask for."""
    job = {"SLURM_CPUS_PER_TASK": str(cpus), "SLURM_MEM_PER_CPU": "1"}
    command = [sys.executable, script, raster, str(window)]
    with open(raster.with_suffix(".txt"), "w+") as errors:
        options = {"cwd": raster.parent, "stderr": errors}
        taken = peak_memory(command, os.environ | job, **options)[0] / cpus
        errors.seek(0)
        line = rf"{raster}: low memory, sbatch --mem-per-cpu=(\d+)\n"
        return taken, int(re.fullmatch(line, errors.read())[1]) * MB


ONE_STRIP = {"blockysize": 6000, "compress": "lzw", "dtype": "int16"}
STACK = tiles(512, dtype="int16", interleave="pixel")


@pytest.mark.parametrize(
    ("size", "profile", "window", "cpus", "limit"),
    [
        ((12000, 3000), {}, 5, [0, 1, 2], 280),
        ((12000, 6000), {}, 51, [16], 280),
        ((12000, 4096), tiles(512), 15, [1, 8], 330),
        ((4100, 4800), tiles(4096), 15, [0, 2, 8], 999),
        ((5490, 1024, 12), STACK, 15, [0, 2], 999),
        ((8000, 6000), ONE_STRIP, 15, [0, 2], 999),
        ((300000, 150), {}, 15, [0, 2], 999),
        ((3000, 300), {}, 1201, [2], 999),
        ((6000, 2000), {"dtype": "float64"}, 15, [0, 2], 999),
    ],
)
def test_job_is_told_what_to_ask_for(tmp_path, size, profile, window, cpus, limit):
    """Never too little, and at most 1.7 times what it takes. 0 CPUs: the simple script."""
    raster = write_zeros(tmp_path / "a.tif", *size, **profile)
    for number in cpus:
        script = MULTI if number else SIMPLE
        taken, told = peak_of(script, raster, window, number or 1)
        print(f"{script.name}, {number} CPUs: takes {taken:.0f} MB, told {told:.0f} MB")
        assert 60 < taken < limit
        assert taken < told < 1.7 * taken


def test_more_rows_or_bands_take_no_more_memory(tmp_path):
    """Of a raster whose bands lie apart, each is blurred by itself."""
    profile = tiles(512, interleave="band")
    low, high, few, many = (
        peak_of(SIMPLE, write_zeros(tmp_path / "a", 3000, *size, **profile), 5)[0]
        for size in ((4500, 1), (9000, 1), (1300, 2), (1300, 20))
    )
    assert high < 1.1 * low, f"{high:.0f} MB with 9000 rows, {low:.0f} MB with 4500"
    assert many < 1.1 * few, f"{many:.0f} MB with 20 bands, {few:.0f} MB with 2"


def list_rows(rasters, quick):
    """Return what the rows of a benchmark's table begin with."""
    cases = [(raster, choose_cases(raster, [ROOT], quick=quick)) for raster in rasters]
    return [(name, case[0], str(case[1])) for name, rows in cases for case in rows]


def test_benchmark_works_and_has_the_rows_of_its_page():
    row = r"(?m)^\| (\w+\.\w+) .*? \| (\S+ ?\d*) \| (\d+) \| .* MB \|$"
    rows = re.findall(row, (ROOT / "tests/benchmark.md").read_text())
    assert rows and rows == list_rows(dict.fromkeys(row[0] for row in rows), False)
    names = ["classic.nc", "width_8204.tif"]
    done = run(sys.executable, ROOT / "tests/benchmark.py", "--quick", *names)
    check_silent(done)
    assert re.findall(row, done.stdout) == list_rows(names, True)
