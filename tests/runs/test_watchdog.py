"""Time-outs of NCCL, whose watchdog aborts ranks: who was late and in which phase, from what the logs have of it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from nccl_messages import notified, waited

from hynb.files import write_json
from hynb.runs import RunDir, RunReader, watchdog_abort

TWO_HOSTS = (("alpha", 4), ("beta", 4))


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    """A run that saves at step 40, whose ranks have printed other things already."""
    run_dir = RunDir(tmp_path)
    run_dir.log.mkdir()
    run_dir.config.write_text("")
    write_json(run_dir.heartbeat, {"phase": "saving", "global_step": 40})
    return run_dir


def write_logs(run_dir: RunDir, texts: dict[int, str]) -> None:
    for rank, text in texts.items():
        before = "{'loss': 1.5}\n 50%|     | 5/10 [00:01<00:01]\r 60%|     | 6/10 [00:01<00:01]\n"
        (run_dir.log / f"20260810030000_rank{rank}.log").write_text(f"{before}{text}Extension modules: numpy\n")


def test_ranks_that_did_not_come_are_named_with_host_and_phase(run_dir):
    """Figures of Pein2017/CoordExp, "distributed collective choreography failure": ranks 0 and 4 waited elsewhere."""
    texts = {rank: waited(rank, 78, "BROADCAST", begun=79) for rank in (1, 2, 3, 5, 6, 7)}
    write_logs(run_dir, texts | {rank: notified(rank, 77, by=1) for rank in (0, 4)})
    abort = watchdog_abort(run_dir, TWO_HOSTS)
    assert abort and abort.late == (0, 4) and abort.waiting == (1, 2, 3, 5, 6, 7)
    assert abort.reason == (
        "rank 0 on alpha and rank 4 on beta did not come in time (save_timeout_minutes) to where the other ranks "
        "waited, saving at step 40: NCCL's watchdog gave up BROADCAST (number 78) after 600 seconds"
    )


def test_a_rank_that_has_not_waited_for_as_long_as_the_others_is_not_late(run_dir):
    """Figures of deepspeedai/DeepSpeed issue 7533: rank 2 has begun the operation that ranks 6 and 7 gave up."""
    texts = {rank: waited(rank, 460631, "ALLREDUCE", milliseconds=600_020) for rank in (6, 7)}
    write_logs(run_dir, texts | {2: notified(2, 460631, completed=460630, by=6), 3: notified(3, 460630, by=6), 5: ""})
    abort = watchdog_abort(run_dir)
    assert abort and abort.late == (3, 5)
    assert abort.reason.startswith("rank 3, 5 did not come in time")


def test_numbers_of_another_group_of_ranks_say_nothing(run_dir):
    """As in PrimeIntellect-ai/prime-rl pull request 3186, where rank 13 waited in a group of some ranks."""
    few = "PG ID 12 PG GUID 100(EXPERT_MODEL_PARALLEL_GROUP)"
    write_logs(
        run_dir, {13: waited(13, 700, "ALLTOALL_BASE", group=few), 0: notified(0, 1261, completed=1259, by=13)}
    )
    abort = watchdog_abort(run_dir)
    assert abort and abort.late == (0,)


def test_where_all_ranks_waited_in_one_operation_no_rank_was_late(run_dir):
    """Figures of hpc-community.unige.ch/t/4301, where the first operation of all four ranks hung."""
    write_logs(run_dir, {rank: waited(rank, 1, "ALLGATHER", milliseconds=600_004) for rank in range(4)})
    write_json(run_dir.heartbeat, {"phase": "training", "global_step": 0})
    abort = watchdog_abort(run_dir, (("alpha", 4),))
    assert abort and abort.late == ()
    assert abort.reason.startswith(
        "no rank was late, training at step 0: all waited in the same operation, ALLGATHER (number 1), until NCCL's "
        "watchdog gave up after 600 seconds (collective_timeout_minutes). A GPU or the network between GPUs hangs"
    )


def test_ranks_that_waited_in_different_operations_are_listed_by_operation(run_dir):
    """Figures of pytorch/pytorch issue 153779."""
    texts = {rank: waited(rank, 532339, "BROADCAST", milliseconds=1_800_042) for rank in (1, 2)}
    write_logs(run_dir, texts | {0: waited(0, 532341, "_ALLGATHER_BASE", milliseconds=1_800_036)})
    run_dir.heartbeat.unlink()
    abort = watchdog_abort(run_dir)
    assert abort and abort.late == ()
    assert abort.reason == (
        "the ranks waited for each other in different operations, in a run, until NCCL's watchdog gave up after 1800 "
        "seconds: rank 1, 2 in BROADCAST (number 532339); rank 0 in _ALLGATHER_BASE (number 532341)"
    )


def test_logs_without_such_messages_and_those_of_an_earlier_run_are_not_counted(run_dir):
    write_logs(run_dir, {0: "Traceback (most recent call last):\n", 1: ""})
    assert watchdog_abort(run_dir, (("alpha", 2),)) is None
    write_logs(run_dir, {1: waited(1, 5, "ALLREDUCE")})
    assert watchdog_abort(run_dir, (("alpha", 2),))
    # A run begins by writing its configuration.
    earlier = time.time() - 100
    for path in run_dir.rank_logs():
        os.utime(path, (earlier, earlier))
    assert watchdog_abort(run_dir, (("alpha", 2),)) is None


def ended_run(run_dir: RunDir) -> str:
    """The reason of a run without supervision, all of whose processes are gone."""
    write_json(run_dir.status, {"state": "running", "process": {"host": "elsewhere", "pid": 1, "create_time": 1.0}})
    set_age(run_dir.heartbeat, 1000)
    status = RunReader(run_dir.path).status()
    assert status.state == "failed"
    return status.reason


def set_age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_the_status_of_a_run_without_supervision_has_the_reason(run_dir):
    write_logs(run_dir, {0: notified(0, 77, by=1), 1: waited(1, 78, "BROADCAST")})
    assert ended_run(run_dir).startswith("rank 0 did not come in time (save_timeout_minutes)")
    record = {"host": "alpha", "time": 1.0, "exit_code": 1}
    # Ranks that have lost the connection to an aborted one, or waited in vain themselves, are not the cause.
    write_json(run_dir.failure(0), record | {"rank": 0, "reason": "RuntimeError: closed", "lost_connection": True})
    write_json(run_dir.failure(1), record | {"rank": 1, "reason": "ValueError: garbage", "lost_connection": False})
    assert ended_run(run_dir).startswith("rank 0 did not come in time (save_timeout_minutes)")
    write_json(run_dir.failure(0), record | {"rank": 0, "reason": "OSError: the disk", "lost_connection": False})
    assert ended_run(run_dir) == "rank 0 on alpha: OSError: the disk"
