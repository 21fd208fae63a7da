"""A run folder that stalls, becomes read-only or is removed while the run trains."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import need
from training_runs import config_of
from waiting import wait_until

from hynb.cli import main
from hynb.launch import Run, launch
from hynb.runs import read_record
from hynb.supervision import processes_of

ENDLESS = {"num_processes": 1, "max_steps": 1_000_000, "save_steps": 100, "save_total_limit": 1, "min_lr": None}


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of its own."""
    programs = ("mkfs.ext4", "fsfreeze", "mount")
    need(os.geteuid() == 0 and all(map(shutil.which, programs)), f"needs root, and {', '.join(programs)}")
    image, path = tmp_path / "image", tmp_path / "disk"
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(128 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, path], capture_output=True).returncode:
        pytest.skip("root may not mount a file on this machine")
    yield path
    subprocess.run(["umount", path], check=True)


def started(files, folder: Path) -> tuple[Run, str]:
    """A run with a checkpoint, and the id of its launch."""
    run = launch(config_of(files, "hunyuan_v1_dense", folder, **ENDLESS))
    wait_until(lambda: run.checkpoints() or not run.status().live, "a checkpoint")
    assert run.status().state == "running", run.status()
    record = read_record(run.dir.launch)
    assert record
    return run, record["id"]


def test_a_disk_that_stalls_ends_nothing_and_a_read_only_one_ends_the_run(files, disk):
    run, launch_id = started(files, disk / "run")
    before = {process.pid for process in processes_of(launch_id)}
    subprocess.run(["fsfreeze", "--freeze", disk], check=True)
    # Longer than what counts as silence of a host.
    time.sleep(12)
    subprocess.run(["fsfreeze", "--unfreeze", disk], check=True)
    step = run.status().global_step
    wait_until(lambda: run.status().global_step > step + 100 or not run.status().live, "steps after the stall")
    assert run.status().state == "running", run.status()
    assert {process.pid for process in processes_of(launch_id)} >= before
    # As after an error of the disk.
    subprocess.run(["mount", "-o", "remount,abort", disk], check=True)
    at = time.monotonic()
    wait_until(lambda: not processes_of(launch_id), "the end of all processes")
    print(f"a disk that becomes read-only: {time.monotonic() - at:.1f} s")
    status = run.wait(timeout_seconds=60)
    assert status.state == "failed" and "or output_dir could not be written" in status.reason, status
    subprocess.run(["umount", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk.parent / "image", disk], check=True)
    assert main(["checkpoints", str(run.output_dir), "--verify"]) == 0, "what was whole is on the disk"


def test_a_run_whose_folder_is_removed_ends(files, tmp_path):
    run, launch_id = started(files, tmp_path / "run")
    run.output_dir.rename(tmp_path / "removed")
    shutil.rmtree(tmp_path / "removed")
    at = time.monotonic()
    wait_until(lambda: not processes_of(launch_id), "the end of all processes")
    print(f"a folder that is removed: {time.monotonic() - at:.1f} s")
    # Without its record of the launch nobody can wait for the supervisor but by its record of the end.
    wait_until(run.dir.exit.exists, "the record of the end")
    status = run.status()
    assert (status.state, status.rank) == ("failed", 0) and "No such file or directory" in status.reason, status
    assert f"{run.output_dir} was removed while the run was live" in status.reason
