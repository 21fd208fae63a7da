"""SIGTERM, as a scheduler sends it before it takes a host away: the run saves a checkpoint and ends as stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from training_runs import config_of, losses, process_of
from waiting import wait_until

from hynb.config import to_yaml
from hynb.launch import Run, launch
from hynb.runs import read_record
from hynb.supervision import processes_of

ENDLESS = {"max_steps": 100_000, "save_steps": 100_000, "lr_scheduler_type": "constant", "min_lr": None}


def pids(run: Run) -> dict[int, str]:
    """Every process of a launched run, with its command line: supervisor, launcher, guard, ranks, their workers."""
    record = read_record(run.dir.launch)
    assert record
    supervisor = psutil.Process(record["process"]["pid"])
    return {process.pid: " ".join(process.cmdline()) for process in (supervisor, *processes_of(record["id"]))}


def wait_for_steps(run: Run, count: int) -> None:
    wait_until(lambda: run.status().global_step >= count or not run.status().live, f"step {count}")
    assert run.status().state == "running", run.status()


def assert_stopped(run: Run, by: str) -> int:
    """The step at which a run has ended, of which there is a checkpoint."""
    status = run.wait(timeout_seconds=300)
    assert status.state == "stopped", status
    found = re.fullmatch(rf"stopped {by} after a checkpoint: checkpoint-(\d+)", status.reason)
    assert found, status.reason
    assert [path.name for path in run.checkpoints()] == [f"checkpoint-{status.global_step}"]
    assert int(found[1]) == status.global_step
    record = read_record(run.dir.launch)
    assert record
    wait_until(lambda: not processes_of(record["id"]), "the end of all processes")
    return status.global_step


def test_sigterm_to_everything_saves_a_checkpoint_from_which_losses_go_on_as_undisturbed(files, ranks, tmp_path):
    values = ENDLESS | {"dataloader_num_workers": 1}
    run = launch(config_of(files, "hunyuan_v1_dense", tmp_path / "run", **values))
    wait_for_steps(run, 2)
    found = pids(run)
    # Ranks, and the processes that read for them, are asked twice, as by a scheduler and by their launcher.
    for pid in [*found, *found]:
        os.kill(pid, signal.SIGTERM)
    kinds = ("hynb.launch", "deepspeed.launcher.launch", "node_guard", "--local_rank=0", "--local_rank=1")
    assert all(any(kind in text for text in found.values()) for kind in kinds), found
    assert sum("--local_rank=0" in text for text in found.values()) == 2, "a rank and its reader"
    step = assert_stopped(run, "by SIGTERM to 2 of 2 ranks")
    before = losses(run)
    values |= {"max_steps": step + 3}
    whole = ranks.train(config_of(files, "hunyuan_v1_dense", tmp_path / "whole", **values))
    values |= {"allow_changed": ["max_steps"], "resume_from_checkpoint": "last"}
    ranks.train(config_of(files, "hunyuan_v1_dense", tmp_path / "run", **values))
    assert len(before) >= 2 and losses(run) == losses(whole)


@pytest.mark.parametrize(
    ("receiver", "by"),
    [
        ("rank", "by SIGTERM to 1 of 2 ranks"),
        ("supervisor", "by SIGTERM to its supervisor"),
        ("follower", "by SIGTERM to `hynb launch --follow`"),
    ],
)
def test_sigterm_to_one_process_stops_all_ranks_at_the_same_step(files, tmp_path, receiver, by):
    config = tmp_path / "run.yaml"
    config.write_text(to_yaml(config_of(files, "hunyuan_v1_dense", tmp_path / "run", **ENDLESS)))
    command = [Path(sys.executable).parent / "hynb", "launch", "--config", config, "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        run = Run(tmp_path / "run")
        wait_until(lambda: run.status().state == "running", "the first step")
        record = read_record(run.dir.launch)
        assert record
        receivers = {"rank": process_of(run, 1).pid, "supervisor": record["process"]["pid"], "follower": follower.pid}
        os.kill(receivers[receiver], signal.SIGTERM)
        shown = follower.communicate(timeout=300)[0]
    assert_stopped(run, by)
    assert follower.returncode == 143 and f"stopped {by}" in shown.splitlines()[-1], shown


def test_sigterm_to_everything_before_the_first_step_ends_the_run_at_once(files, tmp_path):
    run = launch(config_of(files, "hunyuan_v1_dense", tmp_path / "run", **ENDLESS))
    wait_until(lambda: run.status().phase not in (None, "starting"), "a phase after the hosts have joined")
    for pid in pids(run):
        os.kill(pid, signal.SIGTERM)
    status = run.wait(timeout_seconds=300)
    assert (status.state, status.exit_code, status.terminated) == ("stopped", 0, True), status
    assert status.reason == "stopped by SIGTERM to its supervisor before training began"
    record = read_record(run.dir.launch)
    assert record
    wait_until(lambda: not processes_of(record["id"]), "the end of all processes")
