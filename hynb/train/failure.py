"""How a rank reports a failure: in its output, in the run folder, and by its exit code. Imports no torch."""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hynb.errors import HynbError, RankError
from hynb.files import is_full, write_json
from hynb.plan import zero
from hynb.runs import RunDir, RunReader, RunWriter, name_ranks
from hynb.supervision import STACKS_SECONDS

# Time that the other ranks of a host leave rank 0 to report a mistake before the launcher ends it.
_GRACE_SECONDS = 5.0
_MISTAKE_CODE = HynbError.exit_code
_LOST_CONNECTION = (
    *("Connection closed by peer", "Connection reset by peer", "gloo/transport", "remote process exited"),
    *("ncclRemoteError", "Connection was likely closed"),
)
# torch.save reports no errno (torch 2.13, caffe2/serialize/inline_container.cc).
_TORCH_CANNOT_WRITE = ("inline_container.cc", "PytorchStreamWriter failed", "iostream error")

# torch 2.13, utils/data/_utils/signal_handling.py and dataloader.py.
_WORKER_KILLED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (is killed by signal: [^.]+)?")


@dataclass(kw_only=True, frozen=True)
class Failure:
    """What a rank reports of an error.

    Args:
        reason: for the status of the run.
        lines: for the rank's output.
        lost_connection: the rank failed only because another one had ended.
        late: the ranks for which this one has waited in vain.
        of: rank and host that the failure comes from, where all ranks know it; None: this rank.
    """

    reason: str
    lines: list[str]
    exit_code: int
    lost_connection: bool = False
    late: tuple[int, ...] = ()
    of: tuple[int, str] | None = None


def describe(error: BaseException, phase: str = "") -> Failure:
    """A user's mistake as its message alone, any other error with its traceback and, where there is one, a hint.

    Args:
        phase: what the rank was doing, such as "saving at step 40".
    """
    of_worker = _of_worker(error)
    if isinstance(error, HynbError):
        # The message of an error from a worker holds its traceback.
        problems = [of_worker] if of_worker else error.problems
        of = (error.rank, error.host) if isinstance(error, RankError) else None
        lines = [f"hynb: {problem}" for problem in problems]
        return Failure(reason="\n".join(problems), lines=lines, exit_code=error.exit_code, of=of)
    if isinstance(error, SystemExit):
        return _ended_by_exit(error)
    late = _late_ranks(error)
    hint = _hint(error) if late is None else _late_text(late, phase)
    lines = "".join(traceback.format_exception(error)).splitlines()
    return Failure(
        reason=hint or of_worker or f"{type(error).__name__}: {error}",
        lines=[*lines, f"hynb: {hint}"] if hint else lines,
        exit_code=1,
        lost_connection=not hint and any(text in str(error) for text in _LOST_CONNECTION),
        late=tuple(late or ()),
    )


def _of_worker(error: BaseException) -> str:
    """What a process that reads batches ahead raised, behind torch's words about it; empty for any other error."""
    # torch 2.13, _utils.py `ExceptionWrapper`.
    found = re.search(r"Caught \w+ in (DataLoader worker process \d+)\.\n.*Traceback", str(error), re.DOTALL)
    if found is None:
        return ""
    lines = str(error).rstrip().splitlines()
    # The traceback's own lines are indented; the message may have several lines.
    start = max(number for number, line in enumerate(lines) if line.startswith("  ")) + 1
    message = "\n".join(lines[start:])
    if isinstance(error, HynbError):
        message = re.sub(r"^[\w.]+: ", "", message)
    return f"{message} (in a process that reads batches ahead: {found[1]})"


def _ended_by_exit(error: SystemExit) -> Failure:
    """Something in the rank, such as a library or a model's own code, has called sys.exit."""
    code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    place = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    where = f" at {place.filename}:{place.lineno}" if place else ""
    lines = "".join(traceback.format_exception(error)).splitlines()
    # A rank that leaves before the end has failed, whatever code it names.
    return Failure(reason=f"sys.exit({error.code!r}) was called{where}", lines=lines, exit_code=code or 1)


def report_failure(
    error: BaseException,
    rank: int,
    run_dir: RunDir | None,
    *,
    beside_rank_0: bool,
    phase: str = "",
    registry: Path | None = None,
) -> int:
    """Prints what went wrong and records it in the run folder and for this host's guard; returns the exit code.

    Args:
        run_dir: None while the folder is not known to be this run's own: nothing is written then.
        phase: what the rank was doing, such as "saving at step 40".
        beside_rank_0: the rank is on rank 0's host, where rank 0 finds the same mistakes and reports them.
        registry: the folder in which the guard looks for records; it may have space where the run folder's disk has
            none. None without a guard.
    """
    failure = describe(error, phase)
    places = [*([run_dir.log] if run_dir else []), *([registry] if registry else [])]
    if rank != 0 and beside_rank_0 and failure.exit_code == _MISTAKE_CODE:
        time.sleep(_GRACE_SECONDS)
        if any((place / _record_name(0)).exists() for place in places):
            return failure.exit_code
    of_rank, host = failure.of or (rank, socket.gethostname())
    if of_rank != rank and not (rank == 0 and registry is None):
        # That rank reports it.
        time.sleep(_GRACE_SECONDS)
        if any((place / _record_name(of_rank)).exists() for place in places):
            return failure.exit_code
    # The output may go to the disk that is full.
    with contextlib.suppress(OSError):
        print("\n".join(failure.lines), file=sys.stderr, flush=True)
    record = {"rank": of_rank, "host": host, "time": time.time(), "reason": failure.reason}
    record |= {"exit_code": failure.exit_code, "lost_connection": failure.lost_connection, "late": failure.late}
    if registry is not None:
        with contextlib.suppress(OSError):
            write_json(registry / _record_name(of_rank), record)
    if run_dir is not None:
        with contextlib.suppress(OSError):
            _record(failure, record, run_dir, is_rank_0=rank == 0)
    if failure.late and registry is not None:
        # The launcher ends the others as soon as this process has ended: time to see where they are.
        time.sleep(STACKS_SECONDS)
    return failure.exit_code


def _record_name(rank: int) -> str:
    return f"failure_rank{rank}.json"


def _record(failure: Failure, record: dict[str, Any], run_dir: RunDir, *, is_rank_0: bool) -> None:
    run_dir.create()
    run_dir.log.mkdir(exist_ok=True)
    write_json(run_dir.failure(record["rank"]), record)
    if is_rank_0:
        known = RunReader(run_dir.path).status()
        steps = {"global_step": known.global_step, "max_steps": known.max_steps}
        RunWriter(run_dir.path).status("failed", exit_code=failure.exit_code, reason=failure.reason, **steps)


def _late_ranks(error: BaseException) -> list[int] | None:
    """The ranks for which this one has waited in vain, as far as they are known; None for any other error."""
    if "torch" not in sys.modules:
        return None
    from hynb.train.timeouts import is_timeout, late_ranks

    return late_ranks() if is_timeout(error) else None


def _late_text(late: list[int], phase: str) -> str:
    who = name_ranks(late) or "another rank"
    parameter = "save_timeout_minutes" if phase.startswith("saving") else "collective_timeout_minutes"
    return f"{who} did not come in time ({parameter}) to where the other ranks waited, {phase or 'in a run'}"


def _hint(error: BaseException) -> str:
    """What the user can do about an error; empty where hynb does not know."""
    if "OutOfMemory" in type(error).__name__ or "out of memory" in str(error).lower():
        presets = ", ".join(zero.PRESETS)
        return (
            "the GPU's memory is not enough. Try, in this order: per_device_train_batch_size: 1, "
            f"gradient_checkpointing: true, the next preset of {presets}, sequence_parallel_size: 2 or more (GPUs "
            "share each sequence), a smaller max_seq_length, more GPUs"
        )
    if isinstance(error, OSError) and is_full(error):
        return f"{error.filename or 'output_dir'}: the disk is full ({error.strerror}). Free some space, then resume"
    # The signal is in the error from which torch raised this one.
    if found := _WORKER_KILLED.search(f"{error.__cause__}\n{error}"):
        how = found[2] or "ended without a word"
        return (
            f"a process that reads batches ahead (pid {found[1]}) {how}. If somebody or the system's lack of memory "
            "killed it: dataloader_num_workers: 0 reads in the rank itself and takes the least memory"
        )
    if any(text in str(error) for text in _TORCH_CANNOT_WRITE):
        return (
            f"{socket.gethostname()}: torch cannot write a file of the checkpoint: the disk of output_dir is full, "
            "over its quota or gone. Free some space, then resume"
        )
    return ""
