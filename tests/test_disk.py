"""An earlier result survives, and no half result takes its place."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tools import (
    SCRIPTS,
    check_failed,
    check_silent,
    damage_end,
    files,
    read,
    run_as_nobody,
    write_earlier,
    write_raster,
)


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder on a disk of its own, and a function that leaves so many bytes free there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    # Without root, a process may do that for itself; others look there through /proc.
    mount = ["unshare", "--map-root-user", "--mount"]
    script = 'mount -t tmpfs -o size=64m tmpfs "$0" && echo done && exec cat'
    with subprocess.Popen(
        [*mount, "sh", "-c", script, disk],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as holder:
        if not holder.stdout.readline():
            reason = holder.stderr.read().strip()
            assert "CI" not in os.environ, reason
            pytest.skip(f"a small disk needs mount: {reason}")
        disk = Path(f"/proc/{holder.pid}/root{disk}")
        (disk / "run").mkdir()

        def leave(free):
            with open(disk / "full", "wb") as file:
                space = os.statvfs(disk)
                size = space.f_bavail * space.f_bsize - free
                os.posix_fallocate(file.fileno(), 0, size)

        yield disk / "run", leave
        holder.stdin.close()


@pytest.mark.parametrize("script", SCRIPTS)
def test_earlier_result_survives_a_full_disk(run_fast, tmp_path, small_disk, script):
    """Whether its head does not fit, or its pixels."""
    disk, leave = small_disk
    small = write_raster(tmp_path / "small.tif", np.ones((1, 100, 150), np.uint8))
    assert run_fast(script, small, cwd=disk).returncode == 0
    target = disk / "smooth" / "small.tif"
    whole = target.read_bytes()
    earlier = write_earlier(target, small)
    failures = 0
    for free in range(0, len(whole) + 20_000, 4096):  # in steps of the disk's blocks
        leave(free)
        done = run_fast(script, small, cwd=disk)
        assert files(disk / "smooth") == ["small.tif"], free
        if done.returncode == 0:
            assert target.read_bytes() == whole, free
            target.write_bytes(earlier)
        else:
            check_failed(done, small, "the disk full?")
            assert target.read_bytes() == earlier, free
            failures += 1
    assert len(whole) / 4096 <= failures < len(whole) / 4096 + 4


@pytest.mark.parametrize("script", SCRIPTS)
def test_full_disk_leaves_no_part_of_a_large_result(
    run_fast, tmp_path, small_disk, script
):
    """It is refused before anything is read. Its head is longer than its last block."""
    disk, leave = small_disk
    raster = write_raster(tmp_path / "tall.tif", np.ones((1, 20001, 256), np.uint8))
    leave(40_000_000)
    assert run_fast(script, raster, cwd=disk).returncode == 0
    size = (disk / "smooth" / raster.name).stat().st_size
    (disk / "smooth" / raster.name).unlink()
    for free in (4096, size // 2, *range(size - 30_000, size - 4096, 4096)):
        leave(free)
        check_failed(run_fast(script, raster, cwd=disk), raster, "the disk full?")
        assert files(disk) == ["smooth"]


def test_file_named_smooth_survives(tmp_path, run_both, small):
    for script in SCRIPTS:
        (tmp_path / script.stem).mkdir()
        (tmp_path / script.stem / "smooth").write_text("mine")
    for cwd, done in run_both(small):
        check_failed(done, small, "smooth")
        assert (cwd / "smooth").read_text() == "mine"


def test_folder_named_as_the_result_survives(tmp_path, run_both, small):
    for script in SCRIPTS:
        (tmp_path / script.stem / "smooth" / "small.tif").mkdir(parents=True)
    for cwd, done in run_both(small):
        check_failed(done, small, "small.tif")
        assert files(cwd / "smooth") == ["small.tif"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_earlier_result_survives_in_a_folder_without_rights(public, small, script):
    folder = public / "smooth"
    folder.mkdir()
    earlier = write_earlier(folder / "small.tif", small)
    folder.chmod(0o555)
    done = run_as_nobody(script, small, cwd=public)
    check_failed(done, small)
    assert (folder / "small.tif").read_bytes() == earlier
    folder.chmod(0o755)
    shutil.rmtree(folder)
    public.chmod(0o555)
    check_failed(run_as_nobody(script, small, cwd=public), small)
    public.chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS)
def test_reader_of_the_earlier_result_is_not_disturbed(public, small, script):
    """It is replaced whole: who reads the earlier one goes on to read that one."""
    folder = public / "smooth"
    folder.mkdir()
    folder.chmod(0o777)
    target = folder / "small.tif"
    earlier = write_earlier(target, small)
    target.chmod(0o444)
    with open(target, "rb") as reader:
        done = run_as_nobody(script, small, cwd=public)
        check_silent(done)
        assert reader.read() == earlier
    assert read(target).shape == (1, 200, 150)
    shutil.rmtree(folder)


def test_no_sidecar_of_an_earlier_result_is_taken_for_the_new(
    tmp_path, run_both, small
):
    for script in SCRIPTS:
        folder = tmp_path / script.stem / "smooth"
        folder.mkdir(parents=True)
        write_earlier(folder / "small.tif", small)
        for ending in (".aux.xml", ".ovr", ".msk"):
            (folder / f"small.tif{ending}").write_text("earlier")
        (folder / "small.tif.txt").write_text("notes")
    for cwd, done in run_both(small):
        check_silent(done)
        assert files(cwd / "smooth") == ["small.tif", "small.tif.txt"]
        assert read(cwd / "smooth" / "small.tif").shape == (1, 200, 150)


def test_sidecars_survive_without_a_new_result(tmp_path, run_both):
    for script in SCRIPTS:
        folder = tmp_path / script.stem / "smooth"
        folder.mkdir(parents=True)
        (folder / "damaged.tif.ovr").write_text("earlier")
    raster = write_raster(tmp_path / "damaged.tif", np.ones((1, 200, 200), np.uint8))
    damage_end(raster)
    for cwd, done in run_both(raster):
        check_failed(done, raster)
        assert files(cwd / "smooth") == ["damaged.tif.ovr"]
