"""One run that breaks in one way after another, starts again each time by itself, and equals an undisturbed one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import need
from faults.ordered import order, python_path
from training_runs import config_of, losses
from waiting import wait_until

from hynb.launch import Run, launch
from hynb.runs import RunStatus, read_record
from hynb.supervision import processes_of

HOST = socket.gethostname()


@pytest.fixture
def group() -> Iterator[Path]:
    """A group of processes whose memory the kernel limits."""
    root = Path("/sys/fs/cgroup/memory")
    need(os.geteuid() == 0 and (root / "memory.limit_in_bytes").exists(), "needs root and cgroup v1's memory")
    folder = root / f"hynb-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    wait_until(lambda: not (folder / "cgroup.procs").read_text(), "the end of all processes of the group")
    folder.rmdir()


def launch_id(run: Run) -> str:
    record = read_record(run.dir.launch)
    assert record
    return record["id"]


def process(run: Run, *words: str, reads: bool = False) -> psutil.Process:
    """A process of a run by words of its command line.

    Args:
        reads: the one that reads batches ahead for a rank, which it was forked from.
    """
    found = {item.pid: item for item in processes_of(launch_id(run)) if set(words) <= set(item.cmdline())}
    (chosen,) = (item for item in found.values() if (item.ppid() in found) == reads)
    return chosen


def to(number: signal.Signals, *words: str, reads: bool = False) -> Callable[[Run, Path], None]:
    return lambda run, _: process(run, *words, reads=reads).send_signal(number)


def take_host_memory(run: Run, folder: Path) -> None:
    group = Path((folder / "group").read_text())
    used = int((group / "memory.usage_in_bytes").read_text())
    (group / "memory.limit_in_bytes").write_text(f"{used + (64 << 20)}")
    order(folder, 1, "host_memory")


RANK_1 = "--local_rank=1"
# The last one ends the run for good.
FAULTS: dict[str, tuple[Callable[[Run, Path], None], str]] = {
    "SIGKILL to a rank": (to(signal.SIGKILL, RANK_1), f"rank 1 on {HOST} was killed (SIGKILL)"),
    "SIGKILL to the launcher": (to(signal.SIGKILL, "deepspeed.launcher.launch"), "the launcher was killed (SIGKILL)"),
    "SIGKILL to a guard": (to(signal.SIGKILL, "hynb.supervision.node_guard"), f"{HOST}: its guard ended"),
    "SIGINT to a rank": (to(signal.SIGINT, RANK_1), f"rank 1 on {HOST}: interrupted by SIGINT (Ctrl-C)"),
    "SIGKILL to a reader": (
        to(signal.SIGKILL, RANK_1, reads=True),
        f"rank 1 on {HOST}: a process that reads batches ahead (pid ",
    ),
    "host memory": (take_host_memory, f"rank 1 on {HOST} was ended by the kernel for lack of host memory"),
    "GPU memory": (
        lambda _, folder: order(folder, 0, "gpu_memory"),
        f"rank 0 on {HOST}: the GPU's memory is not enough. Try, in this order: per_device_train_batch_size: 1",
    ),
    "exception": (lambda _, folder: order(folder, 1, "exception"), f"rank 1 on {HOST}: ValueError: odd shape"),
}


@pytest.mark.timeout(1800)
def test_each_fault_is_named_and_the_run_goes_on_as_undisturbed(files, ranks, tmp_path, monkeypatch, group):
    (tmp_path / "group").write_text(str(group))
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path))
    values = {"save_steps": 3, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "min_lr": None, "bf16": False}
    config = config_of(files, "hunyuan_v1_dense", tmp_path / "run", save_total_limit=2, **values)
    restarts = {"max_restarts": len(FAULTS) - 1, "dataloader_num_workers": 1, "max_steps": 100_000}
    run = launch(config.replace(**restarts))
    try:
        status = break_in_turn(run, tmp_path, group)
    finally:
        run.kill()
    assert (status.state, status.host, status.rank) == ("failed", HOST, 1)
    assert "\nThe end of its log:\n" in status.reason and 'raise ValueError("odd shape")' in status.reason
    last = newest(run)
    assert f"\nTo go on from checkpoint-{last}: hynb launch --config " in status.reason
    assert status.reason.endswith(
        f"Not started again by itself: all {len(FAULTS) - 1} restarts of max_restarts are used up"
    )
    ranks.train(config.replace(max_steps=last + 2, allow_changed=["max_steps"], resume_from_checkpoint="last"))
    whole = ranks.train(config.replace(max_steps=last + 2, output_dir=str(tmp_path / "whole")))
    assert losses(run) == losses(whole)


def break_in_turn(run: Run, folder: Path, group: Path) -> RunStatus:
    """Makes each fault once there is a checkpoint behind that of the last restart; returns the end of the run."""
    kept = 0
    for number, (name, (make, reason)) in enumerate(FAULTS.items(), 1):
        wait_until(lambda kept=kept: newest(run) > kept or not run.status().live, f"a checkpoint before {name}")
        assert run.status().live, run.status()
        ended, at = launch_id(run), time.time()
        make(run, folder)
        if number < len(FAULTS):
            wait_until(lambda number=number: len(restart_events(run)) == number or not run.status().live, name)
            event = restart_events(run)[-1]
            assert event["reason"].startswith(reason), (name, event)
            seconds, kept = event["time"] - at, int(event["checkpoint"].rpartition("-")[2])
        else:
            status = run.wait(timeout_seconds=300)
            end = read_record(run.dir.exit)
            assert end and status.reason.startswith(reason), status
            seconds = end["ended_at"] - at
        print(f"{name}: {seconds:.1f} s")
        wait_until(lambda ended=ended: not processes_of(ended), f"the end of all processes after {name}")
        # A rank that is ended by the kernel is not held back by the limit of the one before it.
        with contextlib.suppress(OSError):
            (group / "memory.limit_in_bytes").write_text("-1")
    return status


def newest(run: Run) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    return max((int(path.name.rpartition("-")[2]) for path in run.checkpoints()), default=0)


def restart_events(run: Run) -> list[dict]:
    return [event for event in run.events() if event["kind"] == "restart"]
