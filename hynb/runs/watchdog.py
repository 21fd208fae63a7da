"""Why NCCL's watchdog has aborted ranks, from what it printed into their logs.

The watchdog kills its process from a thread (SIGABRT), so that the rank records nothing. Before, it prints the
operation in which the rank waited in vain, and makes all ranks print the number of the last operation that they have
begun (torch 2.13, ProcessGroupNCCL.cpp: `checkTimeout`, `watchdogHandler`, `getNCCLWatchdogTimeoutErrorMsg`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hynb.runs.folder import RunDir
from hynb.runs.heartbeat import read_heartbeat

# The messages are near the end; stack traces of all threads may follow them.
_TAIL_BYTES = 4 << 20
_TIMED_OUT = re.compile(
    r"Watchdog caught collective operation timeout: WorkNCCL\(SeqNum=(?P<number>\d+), OpType=(?P<operation>\w+),"
    r".*? ran for (?P<milliseconds>\d+) milliseconds"
)
_GROUP = re.compile(r"\[(?P<group>PG ID [^\]]*) Rank \d+\]\s+failure detected by watchdog")
_LAST_BEGUN = re.compile(
    r"\[(?P<group>PG ID [^\]]*) Rank \d+\]\s+Received a dump signal .*? Last enqueued NCCL work: (?P<number>-?\d+)"
)
# The limits by phase; in other phases ranks wait for as long as the work of one of them takes.
_LIMITS = {
    "training": "collective_timeout_minutes",
    "evaluating": "collective_timeout_minutes",
    "saving": "save_timeout_minutes",
}


@dataclass(kw_only=True, frozen=True)
class WatchdogAbort:
    """What is known of a time-out of NCCL.

    Args:
        late: the ranks that did not come to where the others waited; empty where none was late.
        waiting: the ranks that waited in vain.
        reason: for the status of the run, with the phase.
    """

    late: tuple[int, ...]
    waiting: tuple[int, ...]
    reason: str


@dataclass(kw_only=True, frozen=True)
class _Wait:
    """The operation in which a rank has waited in vain; operations of a group of ranks are numbered."""

    group: str
    number: int
    operation: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.operation} (number {self.number})"

    @property
    def place(self) -> tuple[str, int, str]:
        """What all ranks that wait for each other have in common."""
        return self.group, self.number, self.operation


def watchdog_abort(run_dir: RunDir, hosts: Sequence[tuple[str, int]] = ()) -> WatchdogAbort | None:
    """Why NCCL's watchdog has aborted ranks of this run; None if it has not.

    Args:
        hosts: name and number of ranks of each host, in the order of the ranks; empty where they are not known.
    """
    texts = _texts(run_dir)
    waits = {rank: wait for rank, text in texts.items() if (wait := _wait(text))}
    if not waits:
        return None
    names = [name for name, count in hosts for _ in range(count)]
    late = _late(waits, texts, set(range(len(names))) or set(texts))
    during, limit = _phase(run_dir)
    longest = max(waits.values(), key=lambda wait: wait.seconds)
    if late:
        reason = (
            f"{name_ranks(late, names)} did not come in time{limit} to where the other ranks waited, {during}: "
            f"NCCL's watchdog gave up {longest} after {longest.seconds:.0f} seconds"
        )
    elif len({wait.place for wait in waits.values()}) > 1:
        where = "; ".join(f"{name_ranks(ranks, names)} in {wait}" for wait, ranks in _by_place(waits))
        reason = (
            f"the ranks waited for each other in different operations, {during}, until NCCL's watchdog gave up after "
            f"{longest.seconds:.0f} seconds{limit}: {where}"
        )
    else:
        reason = (
            f"no rank was late, {during}: all waited in the same operation, {longest}, until NCCL's watchdog gave up "
            f"after {longest.seconds:.0f} seconds{limit}. A GPU or the network between GPUs hangs: test them with "
            "`hynb preflight`, or launch with NCCL_DEBUG=INFO"
        )
    return WatchdogAbort(late=late, waiting=tuple(sorted(waits)), reason=reason)


def name_ranks(ranks: Iterable[int], hosts: Sequence[str] = ()) -> str:
    """Ranks, with the host of each where it is known.

    Args:
        hosts: the host of each rank; empty where they are not known.
    """
    of_host: dict[str, list[int]] = {}
    for rank in ranks:
        of_host.setdefault(hosts[rank] if rank < len(hosts) else "", []).append(rank)
    texts = []
    for host, theirs in of_host.items():
        numbers = ", ".join(map(str, theirs))
        texts.append(f"rank {numbers} on {host}" if host else f"rank {numbers}")
    return " and ".join(texts)


def _phase(run_dir: RunDir) -> tuple[str, str]:
    """What the run did, such as "saving at step 40", and the parameter that limits the wait, in brackets."""
    beat = read_heartbeat(run_dir.heartbeat)
    if beat is None or beat.phase is None:
        return "in a run", ""
    limit = _LIMITS.get(beat.phase)
    return (f"{beat.phase} at step {beat.global_step}", f" ({limit})") if limit else (beat.phase, "")


def _texts(run_dir: RunDir) -> dict[int, str]:
    """The end of each rank's log of this run; an earlier one may have left its own in the folder."""
    # Every run begins by writing its configuration.
    began = run_dir.config.stat().st_mtime if run_dir.config.exists() else 0.0
    found = {}
    for rank, path in run_dir.logs_by_rank().items():
        try:
            if path.stat().st_mtime >= began:
                found[rank] = _end_of(path)
        except OSError:
            continue
    return found


def _end_of(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace")


def _wait(text: str) -> _Wait | None:
    found = _TIMED_OUT.search(text)
    if found is None:
        return None
    group = _GROUP.search(text, found.end())
    return _Wait(
        group=group["group"] if group else "",
        number=int(found["number"]),
        operation=found["operation"],
        seconds=int(found["milliseconds"]) / 1000,
    )


def _late(waits: Mapping[int, _Wait], texts: Mapping[int, str], ranks: set[int]) -> tuple[int, ...]:
    """The ranks that do not wait themselves.

    A rank that has begun the operation, but not waited for as long as the others yet, is not late.
    """
    others = ranks - waits.keys()
    numbers: dict[str, int] = {}
    for wait in waits.values():
        numbers[wait.group] = min(wait.number, numbers.get(wait.group, wait.number))
    begun = {
        rank
        for rank in others
        for found in _LAST_BEGUN.finditer(texts.get(rank, ""))
        if found["group"] in numbers and int(found["number"]) >= numbers[found["group"]]
    }
    return tuple(sorted(others - begun))


def _by_place(waits: Mapping[int, _Wait]) -> list[tuple[_Wait, list[int]]]:
    """The operations in which ranks wait, that with the lowest number first, and the ranks that wait in each."""
    found: dict[tuple[str, int, str], list[int]] = {}
    for rank, wait in sorted(waits.items()):
        found.setdefault(wait.place, []).append(rank)
    ordered = sorted(found.values(), key=lambda waiting: waits[waiting[0]].number)
    return [(waits[waiting[0]], waiting) for waiting in ordered]
