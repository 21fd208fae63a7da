"""A run that is asked to stop while it checks data, meets, loads, evaluates or saves; twice, and from two places."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from faults.ordered import python_path
from training_runs import config_of
from waiting import wait_until

from hynb.config import to_yaml
from hynb.launch import attach, launch
from hynb.runs import read_record
from hynb.supervision import processes_of


@pytest.mark.parametrize(("phase", "ranks"), [("checking data", 1), ("meeting", 2), ("loading", 1)])
def test_before_training_it_ends_at_once(files, tmp_path, monkeypatch, phase, ranks):
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path))
    # Rank 0 stays in the phase until it is asked to stop.
    (tmp_path / "hold").write_text(phase)
    run = launch(config_of(files, "hunyuan_v1_dense", tmp_path / "run", num_processes=ranks))
    wait_until(lambda: run.status().phase == phase or not run.status().live, phase)
    record = read_record(run.dir.launch)
    assert record and run.status().live, run.status()
    at = time.monotonic()
    command = [sys.executable, "-m", "hynb.cli", "stop", run.output_dir]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        status = run.stop(timeout_seconds=300)
        shown = other.communicate(timeout=300)[0]
    print(f"stopped while {phase}: {time.monotonic() - at:.1f} s")
    assert (status.state, status.reason) == ("stopped", "stopped on request before training began")
    assert other.returncode == 0 and status.reason in shown
    wait_until(lambda: not processes_of(record["id"]), "the end of all processes")


@pytest.mark.parametrize("phase", ["evaluating", "saving"])
def test_in_training_what_is_under_way_is_completed(files, ranks, tmp_path, monkeypatch, phase):
    monkeypatch.setenv("STOP_IN", phase)
    values = {"save_steps": 2, "eval_steps": 2, "eval_split": 0.2, "max_steps": 100, "min_lr": None}
    config = config_of(files, "hunyuan_v1_dense", tmp_path / "run", **values)
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config))
    done = ranks.run(path, ranks=2, before="faults.ordered:stop_twice")
    assert done.returncode == 0, done.stderr[-3000:]
    run = attach(config.output_dir)
    status = run.status()
    assert status.state == "stopped" and status.global_step < 100, status
    assert status.reason == f"stopped on request after a checkpoint: checkpoint-{status.global_step}"
    assert run.checkpoints()[-1].name == f"checkpoint-{status.global_step}"
    steps = {
        event["global_step"]
        for event in run.events()
        if event["kind"] == ("eval" if phase == "evaluating" else "save")
    }
    assert 2 in steps
