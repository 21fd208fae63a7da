"""How a rank reports a failure: its output, its record in the run folder, its exit code."""

from __future__ import annotations

import errno
import json
import socket
import time

import pytest

from hynb.errors import ConfigError, RunError, RunFailedError
from hynb.runs import RunDir, RunReader, RunWriter
from hynb.train import report_failure


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    RunWriter(tmp_path).status("running", global_step=3, max_steps=9)
    return RunDir(tmp_path)


def report(error: Exception, rank: int, run_dir: RunDir | None, *, beside_rank_0: bool = True) -> int:
    """As from an `except` block, with a traceback."""
    try:
        raise error
    except Exception as raised:
        return report_failure(raised, rank, run_dir, beside_rank_0=beside_rank_0)


def test_a_mistake_is_its_message_alone(run_dir, capsys):
    assert report(ConfigError(["a: wrong", "b: wrong"]), 0, run_dir) == 2
    assert capsys.readouterr().err == "hynb: a: wrong\nhynb: b: wrong\n"
    status = RunReader(run_dir.path).status()
    assert (status.state, status.exit_code, status.global_step, status.max_steps) == ("failed", 2, 3, 9)
    assert status.reason.endswith("a: wrong\nb: wrong")
    record = json.loads(run_dir.failure(0).read_text())
    assert (record["rank"], record["exit_code"], record["lost_connection"]) == (0, 2, False)
    assert report(RunFailedError("x"), 0, run_dir) == 1


def test_another_error_has_a_traceback_and_where_possible_a_hint(run_dir, capsys):
    assert report(KeyError("weight"), 1, run_dir) == 1
    assert "Traceback" in capsys.readouterr().err
    assert json.loads(run_dir.failure(1).read_text())["reason"] == "KeyError: 'weight'"
    for error, hint in (
        (RuntimeError("CUDA out of memory. Tried to allocate"), "the GPU's memory is not enough"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/model.safetensors"), "/x/model.safetensors: the disk"),
    ):
        assert report(error, 1, run_dir) == 1
        assert f"hynb: {hint}" in capsys.readouterr().err
        assert json.loads(run_dir.failure(1).read_text())["reason"].startswith(hint)


@pytest.mark.parametrize(
    "text", ["[gloo/transport/tcp/pair.cc] Connection closed by peer [10.0.0.2]", "ncclRemoteError: a call failed"]
)
def test_a_lost_connection_is_not_the_cause(run_dir, text):
    report(RuntimeError(text), 1, run_dir)
    time.sleep(0.01)
    report(ValueError("the cause"), 3, run_dir)
    assert json.loads(run_dir.failure(1).read_text())["lost_connection"] is True
    RunWriter(run_dir.path).status("failed", exit_code=1, reason="x")
    assert RunReader(run_dir.path).status().reason.endswith("ValueError: the cause")


def test_beside_rank_0_a_mistake_that_rank_0_reports_is_left_to_it(run_dir, capsys, monkeypatch):
    monkeypatch.setattr("hynb.train.failure._GRACE_SECONDS", 0.2)
    assert report(ConfigError("wrong"), 0, run_dir) == 2
    capsys.readouterr()
    started = time.monotonic()
    assert report(ConfigError("wrong"), 1, run_dir) == 2
    assert time.monotonic() - started >= 0.2, "rank 0 has time to report it before the launcher ends all ranks"
    assert capsys.readouterr().err == "" and not run_dir.failure(1).exists()
    assert report(ConfigError("wrong"), 1, run_dir, beside_rank_0=False) == 2
    assert "hynb: wrong" in capsys.readouterr().err and run_dir.failure(1).exists()


def test_a_mistake_that_only_another_rank_finds_is_reported_on_one_host_too(run_dir, capsys, monkeypatch):
    monkeypatch.setattr("hynb.train.failure._GRACE_SECONDS", 0.2)
    assert report(RunError("/data: cannot be read"), 3, run_dir) == 2
    assert "hynb: /data: cannot be read" in capsys.readouterr().err
    record = json.loads(run_dir.failure(3).read_text())
    assert (record["rank"], record["host"]) == (3, socket.gethostname())


def test_a_record_reaches_the_guard_where_the_run_folder_cannot_be_written(tmp_path, capsys):
    (tmp_path / "log").write_text("a file where the folder of logs would be")
    (tmp_path / "registry").mkdir()
    error = OSError(errno.ENOSPC, "No space left on device", "/x/optimizer.pt")
    code = report_failure(error, 1, RunDir(tmp_path), beside_rank_0=False, registry=tmp_path / "registry")
    assert code == 1
    (path,) = (tmp_path / "registry").iterdir()
    record = json.loads(path.read_text())
    assert path.name == "failure_rank1.json" and record["host"] == socket.gethostname()
    assert record["reason"].startswith("/x/optimizer.pt: the disk is full (No space left on device)")


def test_a_refused_run_writes_nothing(tmp_path, capsys):
    assert report(ConfigError("wrong"), 0, None) == 2
    assert "hynb: wrong" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
