"""How a rank reports a failure: in its output, in the run folder, and by its exit code. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hynb.errors import HynbError
from hynb.files import write_json
from hynb.plan import zero
from hynb.runs import RunDir, RunReader, RunWriter, name_ranks

# Time that the other ranks of a host leave rank 0 to report a mistake before the launcher ends it.
_GRACE_SECONDS = 5.0
_MISTAKE_CODE = HynbError.exit_code
_LOST_CONNECTION = (
    *("Connection closed by peer", "Connection reset by peer", "gloo/transport", "remote process exited"),
    *("ncclRemoteError", "Connection was likely closed"),
)
# torch.save reports no errno (torch 2.13, caffe2/serialize/inline_container.cc).
_TORCH_CANNOT_WRITE = ("inline_container.cc", "PytorchStreamWriter failed", "iostream error")


@dataclass(kw_only=True, frozen=True)
class Failure:
    """What a rank reports of an error.

    Args:
        reason: for the status of the run.
        lines: for the rank's output.
        lost_connection: the rank failed only because another one had ended.
        late: the ranks for which this one has waited in vain.
    """

    reason: str
    lines: list[str]
    exit_code: int
    lost_connection: bool = False
    late: tuple[int, ...] = ()


def describe(error: Exception, phase: str = "") -> Failure:
    """A user's mistake as its message alone, any other error with its traceback and, where there is one, a hint.

    Args:
        phase: what the rank was doing, such as "saving at step 40".
    """
    if isinstance(error, HynbError):
        lines = [f"hynb: {problem}" for problem in error.problems]
        return Failure(reason=str(error), lines=lines, exit_code=error.exit_code)
    late = _late_ranks(error)
    hint = _hint(error) if late is None else _late_text(late, phase)
    lines = "".join(traceback.format_exception(error)).splitlines()
    return Failure(
        reason=hint or f"{type(error).__name__}: {error}",
        lines=[*lines, f"hynb: {hint}"] if hint else lines,
        exit_code=1,
        lost_connection=not hint and any(text in str(error) for text in _LOST_CONNECTION),
        late=tuple(late or ()),
    )


def report_failure(
    error: Exception,
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
    if rank != 0 and beside_rank_0 and failure.exit_code == _MISTAKE_CODE:
        time.sleep(_GRACE_SECONDS)
        places = [*([run_dir.log] if run_dir else []), *([registry] if registry else [])]
        if any((place / _record_name(0)).exists() for place in places):
            return failure.exit_code
    # The output may go to the disk that is full.
    with contextlib.suppress(OSError):
        print("\n".join(failure.lines), file=sys.stderr, flush=True)
    record = {"rank": rank, "host": socket.gethostname(), "time": time.time(), "reason": failure.reason}
    record |= {"exit_code": failure.exit_code, "lost_connection": failure.lost_connection, "late": failure.late}
    if registry is not None:
        with contextlib.suppress(OSError):
            write_json(registry / _record_name(rank), record)
    if run_dir is not None:
        with contextlib.suppress(OSError):
            _record(failure, record, run_dir)
    return failure.exit_code


def _record_name(rank: int) -> str:
    return f"failure_rank{rank}.json"


def _record(failure: Failure, record: dict[str, Any], run_dir: RunDir) -> None:
    run_dir.log.mkdir(parents=True, exist_ok=True)
    write_json(run_dir.failure(record["rank"]), record)
    if record["rank"] == 0:
        known = RunReader(run_dir.path).status()
        steps = {"global_step": known.global_step, "max_steps": known.max_steps}
        RunWriter(run_dir.path).status("failed", exit_code=failure.exit_code, reason=failure.reason, **steps)


def _late_ranks(error: Exception) -> list[int] | None:
    """The ranks for which this one has waited in vain, as far as they are known; None for any other error."""
    if "torch" not in sys.modules:
        return None
    from hynb.train.timeouts import is_timeout, late_ranks

    return late_ranks() if is_timeout(error) else None


def _late_text(late: list[int], phase: str) -> str:
    who = name_ranks(late) or "another rank"
    parameter = "save_timeout_minutes" if phase.startswith("saving") else "collective_timeout_minutes"
    return f"{who} did not come in time ({parameter}) to where the other ranks waited, {phase or 'in a run'}"


def _hint(error: Exception) -> str:
    """What the user can do about an error; empty where hynb does not know."""
    if "OutOfMemory" in type(error).__name__ or "out of memory" in str(error).lower():
        presets = ", ".join(zero.PRESETS)
        return (
            "the GPU's memory is not enough. Try, in this order: per_device_train_batch_size: 1, "
            f"gradient_checkpointing: true, the next preset of {presets}, sequence_parallel_size: 2 or more (GPUs "
            "share each sequence), a smaller max_seq_length, more GPUs"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.filename or 'output_dir'}: the disk is full ({error.strerror}). Free some space, then resume"
    if any(text in str(error) for text in _TORCH_CANNOT_WRITE):
        return (
            f"{socket.gethostname()}: torch cannot write a file of the checkpoint: the disk of output_dir is full, "
            "over its quota or gone. Free some space, then resume"
        )
    return ""
