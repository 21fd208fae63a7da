"""How a rank reports a failure: its output, its record in the run folder, its exit code."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import time

import pytest
import torch

from hynb.errors import ConfigError, DataError, RankError, RunError, RunFailedError
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


class _Broken(torch.utils.data.Dataset):
    def __init__(self, error: Exception | int) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        if isinstance(self.error, int):
            os.kill(os.getpid(), self.error)
        raise self.error


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (DataError("/x.jsonl:3: not JSON\nand more"), 2, "/x.jsonl:3: not JSON\nand more (in a process that reads"),
        (
            ValueError("odd"),
            1,
            "ValueError: odd (in a process that reads batches ahead: DataLoader",
        ),
        (signal.SIGKILL, 1, "a process that reads batches ahead (pid "),
        (signal.SIGSEGV, 1, "a process that reads batches ahead (pid "),
    ],
)
def test_a_failure_in_a_worker_of_the_data_loader_is_its_own_message(run_dir, capsys, error, code, reason):
    with pytest.raises(Exception) as caught:
        list(torch.utils.data.DataLoader(_Broken(error), num_workers=1))
    assert report(caught.value, 0, run_dir) == code
    found = json.loads(run_dir.failure(0).read_text())["reason"]
    assert found.startswith(reason)
    assert "Original Traceback" not in found
    if isinstance(error, int):
        # torch learns of the signal only where its handler runs before it looks for the process.
        texts = {signal.SIGKILL: "Killed", signal.SIGSEGV: "Segmentation fault"}
        assert texts[error] in found or "ended without a word" in found
    capsys.readouterr()


def test_sys_exit_in_a_rank_is_named_with_its_place(run_dir, capsys):
    for code, shown, exit_code in ((3, "3", 3), ("done", "'done'", 1), (None, "None", 1)):
        with pytest.raises(SystemExit) as caught:
            sys.exit(code)
        assert report_failure(caught.value, 0, run_dir, beside_rank_0=True) == exit_code
        found = json.loads(run_dir.failure(0).read_text())["reason"]
        assert found.startswith(f"sys.exit({shown}) was called at {__file__}:")
    capsys.readouterr()


def test_what_all_ranks_know_is_reported_of_the_rank_that_it_comes_from(run_dir, capsys, monkeypatch):
    monkeypatch.setattr("hynb.train.failure._GRACE_SECONDS", 0.2)
    error = RankError("step 3: the loss is nan", rank=1, host="beta")
    assert report(error, 1, run_dir) == 1
    assert capsys.readouterr().err == "hynb: step 3: the loss is nan\n"
    assert report(error, 2, run_dir) == 1
    assert capsys.readouterr().err == "", "rank 1 has said it"
    assert report(error, 0, run_dir) == 1
    (record,) = run_dir.failures()
    assert (record["rank"], record["host"]) == (1, "beta")
    status = RunReader(run_dir.path).status()
    assert status.state == "failed" and status.reason == "rank 1 on beta: step 3: the loss is nan"
