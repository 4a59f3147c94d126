"""Runs cut off at any change of their folder, by a kill or a full disk: nothing half is taken for whole; they go on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cut_off
import pytest

ROOT = Path(__file__).parents[1]


def cut(job: str, fault: str, folder: Path, stride: int) -> list[dict]:
    """What came of the runs of a job that were cut off at every `stride`-th change."""
    ran = subprocess.run([sys.executable, str(ROOT / "tests" / "cut_off.py"), job, fault, str(folder), str(stride)],
                         capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    whole, *runs = map(json.loads, ran.stdout.splitlines())
    assert whole["first"]["code"] == 0 and whole["missing"] == [], whole
    assert len(runs) == -(-whole["first"]["changes"] // stride) > 2
    return runs


STRIDES = {"prune": 4, "train": 2, "trace": 1}


@pytest.mark.slow
@pytest.mark.parametrize("job", STRIDES)
def test_killed_at_any_change_of_its_folder_a_run_goes_on_and_ends_the_same(tmp_path, job):
    for run in cut(job, "kill", tmp_path, STRIDES[job]):
        assert run["first"] == {"killed": True}, run
        check_again(run)


@pytest.mark.slow
@pytest.mark.parametrize("job", STRIDES)
def test_with_a_full_disk_from_any_change_on_a_run_says_so_and_goes_on_later(tmp_path, job):
    for run in cut(job, "full", tmp_path, STRIDES[job]):
        first = run["first"]
        assert first["code"] == 4 and "got      a full disk" in first["words"], run
        check_again(run)


def check_again(run: dict) -> None:
    """Raises AssertionError unless nothing half was left, and the same command finished the work."""
    assert run["wrong"] == [], run
    assert run["again"]["code"] == 0 and run["missing"] == [] and run["unfinished"] == [] and run["same"], run


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own in memory, and a function that sets its size."""
    place = tmp_path / "disk"
    place.mkdir()

    def size(kilobytes: int, *, mounted: bool = True) -> bool:
        options = f"{'remount,' if mounted else ''}size={kilobytes}k"
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "sentei-test", str(place)], capture_output=True,
                              check=False).returncode == 0

    if os.geteuid() or shutil.which("mount") is None or not size(1024, mounted=False):
        pytest.skip("only root may mount a small disk, and not everywhere")
    yield place, size
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [16, 64, 256, 512, 700, 900, 1100, 1400])
def test_on_a_small_disk_a_run_says_so_and_goes_on_when_there_is_room(prune, small_disk, kilobytes):
    disk, size = small_disk
    assert size(kilobytes)
    done = prune(out=disk / "out")
    assert done.returncode in (0, 4)
    if done.returncode:
        assert "got      a full disk" in done.stderr
        assert cut_off.wrong_with("prune", disk / "out", {}) == []
    assert size(1 << 16)
    assert prune(out=disk / "out").returncode == 0
    assert cut_off.RESULT["prune"] <= set(os.listdir(disk / "out"))
