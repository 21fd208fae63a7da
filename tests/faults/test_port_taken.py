"""The port at which the ranks are to meet belongs to another program, at the launch or a moment later."""

from __future__ import annotations

import os
import re
import socket

import pytest
from faults.ordered import python_path
from training_runs import config_of
from waiting import wait_until

from hynb.errors import ClusterError
from hynb.launch import launch
from hynb.runs import read_record
from hynb.supervision import processes_of


def test_who_has_it_is_named_before_a_launch_and_what_happened_after_it(files, tmp_path, monkeypatch):
    config = config_of(files, "hunyuan_v1_dense", tmp_path / "run")
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=rf"master_port = {port}: is taken by .*{os.getpid()}"):
            launch(config.replace(master_port=port))
        assert not (tmp_path / "run").exists()
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path))
    (tmp_path / "hold").write_text("checking data")
    run = launch(config)
    wait_until(lambda: run.status().phase == "checking data" or not run.status().live, "the check")
    record = read_record(run.dir.launch)
    assert record and run.status().live, run.status()
    found = re.search(r"--master_port=(\d+)", " ".join(record["argv"]))
    assert found
    with socket.create_server(("", int(found[1]))):
        (tmp_path / "hold").unlink()
        status = run.wait(timeout_seconds=300)
    assert (status.state, status.rank) == ("failed", 0)
    text = f"port {found[1]}, at which the ranks meet, was free at the launch and has been taken since: process "
    assert f"{text}{os.getpid()}, " in status.reason and "Traceback" not in status.reason, status
    wait_until(lambda: not processes_of(record["id"]), "the end of all processes")
