"""The identity of a process, and the files of a run folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import asdict

import psutil

from hynb.runs import ProcessId, RunDir


def test_this_process_is_alive_and_another_host_is_unknown():
    identity = ProcessId.of(os.getpid())
    assert identity.alive() is True
    assert ProcessId(**asdict(identity) | {"create_time": 1.0}).alive() is False, "a reused pid"
    assert ProcessId(**asdict(identity) | {"host": "elsewhere"}).alive() is None


def test_a_zombie_is_not_alive():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    identity = ProcessId.of(process.pid)
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert identity.alive() is False
    process.wait()


def test_checkpoints_and_logs_are_listed_in_order(tmp_path):
    run_dir = RunDir(tmp_path)
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", "checkpoint-"):
        (tmp_path / name).mkdir()
    assert [path.name for path in run_dir.checkpoints()] == ["checkpoint-9", "checkpoint-10"]
    run_dir.log.mkdir()
    for name in ("20260101000000_rank10", "20260101000000_rank2", "20260102000000_rank2", "launcher"):
        (run_dir.log / f"{name}.log").touch()
    logs = ["20260102000000_rank2.log", "20260101000000_rank10.log"]
    assert [path.name for path in run_dir.rank_logs()] == logs
    assert run_dir.rank_log(2) == run_dir.log / logs[0] and run_dir.rank_log(0) is None
