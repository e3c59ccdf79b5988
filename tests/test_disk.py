"""An earlier result survives, and no half result takes its place."""

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import rasters
import runs
from runs import SCRIPTS, check_failed, check_silent, files


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder on a disk of its own, and a function that leaves so many bytes free there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    # Without root, a process may do that for itself; others look there through /proc.
    script = 'mount -t tmpfs -o size=64m tmpfs "$0" && echo done && exec cat'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, disk]
    pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
    with subprocess.Popen(command, text=True, **pipes) as holder:
        if not holder.stdout.readline():
            reason = holder.stderr.read().strip()
            assert "CI" not in os.environ, reason
            pytest.skip(f"a small disk needs mount: {reason}")
        disk = Path(f"/proc/{holder.pid}/root{disk}")

        def leave(free):
            with open(disk / "full", "wb") as file:
                space = os.statvfs(disk)
                size = space.f_bavail * space.f_bsize - free
                os.posix_fallocate(file.fileno(), 0, size)

        yield disk, leave
        holder.stdin.close()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("shape", [(1, 40, 90), (1, 20001, 256)])
def test_earlier_result_survives_a_full_disk(run_fast, dem, small_disk, script, shape):
    """If its head, some of its pixels or the last ones do not fit; the second head is long."""
    disk, leave = small_disk
    leave(40_000_000)
    raster = dem(np.ones(shape, np.uint8))
    check_silent(run_fast(script, raster, cwd=disk))
    target = disk / "smooth/dem.tif"
    whole = target.read_bytes()
    size, step = len(whole), 4096  # in steps of the disk's blocks
    earlier = rasters.write_earlier(target, raster)
    frees = range(0, size + 5 * step, step)
    if size > 10**6:
        frees = step, 100_000, size // 2, size - 30_000, size - 2 * step
    for free in frees:
        leave(free)
        done = run_fast(script, raster, cwd=disk)
        assert files(disk / "smooth") == ["dem.tif"], (free, done)
        if done.returncode == 0:
            assert target.read_bytes() == whole and free >= size, (free, done)
            target.write_bytes(earlier)
        else:
            check_failed(done, raster)
            assert re.search("disk full|No space left", done.stderr), (free, done)
            assert target.read_bytes() == earlier and free < size + 4 * step, free


@pytest.mark.parametrize("taken", ["smooth", "smooth/small.tif/notes"])
def test_what_has_the_name_of_a_result_survives(tmp_path, run_both, small, taken):
    """A file named smooth, or a folder named as the result."""
    for script in SCRIPTS:
        path = tmp_path / script.stem / taken
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    for cwd, done in run_both(small):
        check_failed(done, small, taken.removesuffix("/notes"))
        assert (cwd / taken).read_text() == "mine"
        assert files(cwd)[-1] == taken, done


@pytest.mark.parametrize("script", SCRIPTS)
def test_earlier_result_is_replaced_whole_or_not_at_all(public, small, script):
    """Without rights for the folder it stays; who reads it goes on to read that one."""
    folder = public / "smooth"
    folder.mkdir()
    target = folder / "small.tif"
    earlier = rasters.write_earlier(target, small)
    target.chmod(0o444)
    with open(target, "rb") as reader:
        folder.chmod(0o555)
        check_failed(runs.run_as_nobody(script, small, cwd=public), small)
        assert target.read_bytes() == earlier
        folder.chmod(0o777)
        check_silent(runs.run_as_nobody(script, small, cwd=public))
        assert reader.read() == earlier
    assert rasters.read(target).shape == (1, 200, 150)


def test_sidecars_stay_until_a_new_result_is_there(run_both, folders, damaged, dem):
    """Then they go, as they would be taken for those of the new one."""
    names = [f"dem.tif{ending}" for ending in ("", ".aux.xml", ".msk", ".ovr", ".txt")]
    for cwd in folders:
        for name in names:
            (cwd / "smooth" / name).write_text("earlier")
        rasters.write_earlier(cwd / "smooth/dem.tif", damaged)
    for cwd, done in run_both(damaged):
        check_failed(done, damaged, "cannot read it")
        assert files(cwd / "smooth") == names, done
    for cwd, done in run_both(dem(np.ones((1, 40, 50), np.float32))):
        check_silent(done)
        assert files(cwd / "smooth") == ["dem.tif", "dem.tif.txt"], done
        assert rasters.read(cwd / "smooth/dem.tif").shape == (1, 40, 50)
