"""What NCCL's watchdog prints when ranks have waited in vain, for tests on machines without GPUs.

The lines are those of torch's ProcessGroupNCCL.cpp (checkTimeout, watchdogHandler, heartbeatMonitor,
handleException), in the form that published logs show; where a test has the figures of such a log, it names the log.
"""

from __future__ import annotations

DEFAULT_GROUP = "PG ID 0 PG GUID 0(default_pg)"
_PREFIX = "[rank{rank}]:[E810 03:04:11.061727749 ProcessGroupNCCL.cpp:{line}] "
_ADVICE = "This is most likely caused by incorrect usages of collectives, e.g., wrong sizes used across ranks, … "


def waited(
    rank: int,
    number: int,
    operation: str,
    *,
    begun: int | None = None,
    milliseconds: int = 600_096,
    group: str = DEFAULT_GROUP,
) -> str:
    """What a rank prints that has waited in vain and is then aborted.

    Args:
        number: of the operation in which it waited.
        begun: the number of the last operation that it has begun; None for that one.
    """
    limit = milliseconds // 1000 * 1000
    message = (
        f"[Rank {rank}] Watchdog caught collective operation timeout: WorkNCCL(SeqNum={number}, OpType={operation}, "
        f"NumelIn=80, NumelOut=80, Timeout(ms)={limit}) ran for {milliseconds} milliseconds before timing out."
    )
    lines = [
        (757, message),
        (
            2395,
            f"[{group} Rank {rank}]  failure detected by watchdog at work sequence id: {number} "
            f"PG status: last enqueued work: {begun or number}, last completed work: {number - 1}",
        ),
        (2732, f"[{group} Rank {rank}] First PG on this rank to signal dumping."),
        (
            818,
            f"[Rank {rank}] Some NCCL operations have failed or timed out. Due to the asynchronous nature of CUDA "
            "kernels, subsequent GPU operations might run on corrupted/incomplete data.",
        ),
        (832, f"[Rank {rank}] To avoid data inconsistency, we are taking the entire process down."),
        (2197, f"[{group} Rank {rank}] Process group watchdog thread terminated with exception: {message}"),
    ]
    printed = "".join(_PREFIX.format(rank=rank, line=line) + text + "\n" for line, text in lines)
    return printed + "terminate called after throwing an instance of 'c10::DistBackendError'\n"


def notified(rank: int, begun: int, *, by: int, completed: int | None = None) -> str:
    """What a rank prints that did not give up itself, when another one has.

    Args:
        begun, completed: the numbers of its last operations in the group of all ranks.
        by: the rank that gave up first.
    """
    prefix = f"[{DEFAULT_GROUP} Rank {rank}] "
    completed = begun if completed is None else completed
    lines = [
        (1922, "Observed flight recorder dump signal from another rank via TCPStore."),
        (
            1987,
            f"Received a dump signal due to a collective timeout from  rank {by} and we will try our best to dump "
            f"the debug info. Last enqueued NCCL work: {begun}, last completed NCCL work: {completed}.{_ADVICE}",
        ),
        (1700, "ProcessGroupNCCL preparing to dump debug info. Include stack trace: 1, only active collectives: 0"),
    ]
    return "".join(_PREFIX.format(rank=rank, line=line) + prefix + text + "\n" for line, text in lines)
