"""Ends that somebody has asked for: the request that any process may leave for the ranks, and what is recorded."""

from __future__ import annotations

from typing import Any

from hynb.files import leave_request
from hynb.runs.folder import RunDir


def request_stop(run_dir: RunDir, by: str) -> None:
    """Leaves a request; an earlier one stays.

    Args:
        by: who asks, as a text that follows "stopped".

    Raises:
        OSError: it cannot be written.
    """
    if not run_dir.stop_request.is_file():
        leave_request(run_dir.stop_request, f"{by}\n")


def stop_cause(run_dir: RunDir) -> str:
    """Who has asked for the end, as a text that follows "stopped"."""
    try:
        return run_dir.stop_request.read_text(encoding="utf-8").strip() or "on request"
    except (OSError, ValueError):
        return "on request"


def stopped_end(by: str, when: str) -> dict[str, Any]:
    """The record of the end of a run that was stopped.

    Args:
        by: who asked, as a text that follows "stopped".
        when: a text that follows it.
    """
    return {"state": "stopped", "exit_code": 0, "reason": f"stopped {by} {when}", "terminated": "SIGTERM" in by}


def killed_reason(run_dir: RunDir) -> str:
    """The reason of a run that was killed on request, with what is kept of it."""
    kept = run_dir.checkpoints()
    what = f"the last checkpoint is {kept[-1].name}" if kept else "there is no checkpoint"
    return f"killed on request; {what}"
