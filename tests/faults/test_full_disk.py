"""A disk that is full to the last byte: what `on_full_disk` lets a run do about it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import need
from faults.breaking import fill
from training_runs import config_of

from hynb.config import to_yaml
from hynb.runs import RunDir, RunReader, RunWriter, notice_line


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of 64 MB of its own."""
    need(os.geteuid() == 0, "only root can mount a small file system")
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("root may not mount a file system on this machine")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_goes_on_without_checkpoints_until_there_is_space(files, ranks, disk, method):
    values = {"max_steps": 5, "save_steps": 1, "on_full_disk": "keep_training", "deepspeed": "ds_zero3_no_offload"}
    config = config_of(files, "hunyuan_v1_dense", disk / "run", **values, use_lora=method == "lora")
    run = ranks.train(config, before="faults.breaking:full_disk_from_step_2")
    assert run.status().state == "finished"
    assert [path.name for path in run.checkpoints()] == ["checkpoint-1", "checkpoint-5"]
    events = run.events()
    logged = [event["global_step"] for event in events if event["kind"] == "log"]
    assert logged == [1, 2, 3, 4, 5], "events wait for space"
    left_out = [event for event in events if event["kind"] == "not_saved"]
    assert [event["global_step"] for event in left_out] == [2, 3, 4, 5, 5]
    assert notice_line(left_out[0]).startswith("step 2: no checkpoint is saved: a checkpoint takes about ")
    assert "the last checkpoint waits until there is space" in notice_line(left_out[-1])


def test_a_run_ends_where_it_is_not_to_go_on(files, ranks, disk, tmp_path):
    values = {"max_steps": 5, "save_steps": 1, "deepspeed": "ds_zero3_no_offload"}
    config = config_of(files, "hunyuan_v1_dense", disk / "run", **values)
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config))
    done = ranks.run(path, ranks=2, before="faults.breaking:full_disk_from_step_2")
    assert done.returncode == 1 and "the disk is full" in done.stderr
    assert [path.name for path in RunDir(config.output_dir).checkpoints()] == ["checkpoint-1"]


def test_events_wait_for_space_in_order(disk):
    writer = RunWriter(disk / "run")
    writer.outlives_full_disk = True
    writer.event("log", 1)
    fill(disk / "filler")
    for step in range(2, 400):
        writer.event("log", step, text="x" * 1000)
        writer.status("running", global_step=step, reason=f"step {step}")
    # Room for some of the events that wait, and then for all.
    os.truncate(disk / "filler", (disk / "filler").stat().st_size - 20 * 4096)
    writer.event("log", 400)
    assert 20 < len(RunReader(disk / "run").new_events()) < 100
    (disk / "filler").unlink()
    writer.event("log", 401)
    steps = [event["global_step"] for event in RunReader(disk / "run").new_events()]
    assert steps == list(range(1, 402))
