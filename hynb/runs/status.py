"""The state of a run, derived from its folder and its processes."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any, Literal

from hynb.files import read_json
from hynb.runs.folder import ProcessId, RunDir

# A rank on another host is taken for dead when its heartbeat is this old.
STALE_HEARTBEAT_SECONDS = 90.0
State = Literal["absent", "starting", "running", "stopping", "finished", "stopped", "failed"]
LIVE_STATES = ("starting", "running", "stopping")


@dataclass(kw_only=True, frozen=True)
class RunStatus:
    """What a watcher knows of a run, derived from its files alone.

    Args:
        host: the host of a run over several that failed, by its name in the hostfile.
        rank: the rank that failed, where it was one.
    """

    state: State
    global_step: int = 0
    max_steps: int | None = None
    exit_code: int | None = None
    reason: str = ""
    host: str | None = None
    rank: int | None = None
    updated_at: float | None = None

    @property
    def live(self) -> bool:
        """Whether the run's processes are there."""
        return self.state in LIVE_STATES

    def __str__(self) -> str:
        steps = f", step {self.global_step}" + (f" of {self.max_steps}" if self.max_steps else "")
        return f"{self.state}{steps if self.global_step else ''}{': ' + self.reason if self.reason else ''}"


def read_status(run_dir: RunDir) -> RunStatus:
    """The run's state, from the ranks' record, the launcher's and the processes that are there."""
    if not run_dir.path.is_dir():
        return RunStatus(state="absent", reason=f"there is no folder {run_dir.path}")
    record = read_json(run_dir.status)
    launch = read_json(run_dir.launch)
    ended = read_json(run_dir.exit)
    if record is None and launch is None:
        reason = f"no run was started in {run_dir.path}"
        with contextlib.suppress(OSError):
            leader = run_dir.led_from.read_text().strip()
            reason = f"{run_dir.path} is this host's part of a run that is led from {leader}: look there"
        return RunStatus(state="absent", reason=reason)
    record = record or {"state": "starting"}
    if record["state"] == "starting" and not record.get("reason"):
        record = record | {"reason": _joining(run_dir)}
    known = {
        "global_step": max(record.get("global_step") or 0, _heartbeat_step(run_dir)),
        "max_steps": record.get("max_steps"),
        "exit_code": record.get("exit_code"),
        "reason": record.get("reason", ""),
        "host": record.get("host"),
        "rank": record.get("rank"),
        "updated_at": record.get("updated_at"),
    }
    # In a run over several hosts the supervisor has weighed what each of them said.
    if record["state"] == "failed" and "host" not in record:
        known["reason"] = _failure(run_dir) or known["reason"]
    if record["state"] not in LIVE_STATES:
        return RunStatus(state=record["state"], **known)
    if _processes_alive(run_dir, record, launch if ended is None else None):
        asked = run_dir.stop_request.exists() and record["state"] != "starting"
        return RunStatus(state="stopping" if asked else record["state"], **known)
    ended = ended or {}
    reason = ended.get("reason") or "its processes are gone and left no record: killed, or out of memory"
    reason = reason if "host" in ended else _failure(run_dir) or reason
    known |= {"exit_code": ended.get("exit_code"), "reason": reason}
    known |= {"host": ended.get("host"), "rank": ended.get("rank")}
    return RunStatus(state=ended.get("state", "failed"), **known)


def _failure(run_dir: RunDir) -> str:
    """The first cause among what the failed ranks said; empty when none said anything."""
    failures = run_dir.failures()
    causes = [failure for failure in failures if not failure.get("lost_connection")]
    if causes:
        return f"rank {causes[0]['rank']} on {causes[0]['host']}: {causes[0]['reason']}"
    if not failures:
        return ""
    silent = set(range((read_json(run_dir.manifest) or {}).get("world_size", 0))) - {
        failure["rank"] for failure in failures
    }
    who = f"rank {', '.join(map(str, sorted(silent)))}" if silent else "another rank"
    return f"{who} ended without a word (killed, or out of memory), and the others lost their connection to it"


def _joining(run_dir: RunDir) -> str:
    """How far the hosts of a run over several have come; empty for other runs."""
    known = read_json(run_dir.hosts) or {}
    if folder := known.get("output_dir"):
        return f"all hosts have joined; output_dir is {folder}"
    waiting = [host["name"] for host in known.get("hosts", []) if host["state"] == "waiting"]
    if not waiting:
        return ""
    lines = f"; the lines to paste there are in {run_dir.paste}" if run_dir.paste.exists() else ""
    return f"waiting for {', '.join(waiting)} to join{lines}"


def _heartbeat_step(run_dir: RunDir) -> int:
    try:
        return int(run_dir.heartbeat.read_text())
    except (OSError, ValueError):
        return 0


def _processes_alive(run_dir: RunDir, record: dict[str, Any], launch: dict[str, Any] | None) -> bool:
    for process in (item["process"] for item in (record, launch) if item and "process" in item):
        alive = ProcessId(**process).alive()
        if alive is None:
            with contextlib.suppress(OSError):
                alive = time.time() - run_dir.heartbeat.stat().st_mtime < STALE_HEARTBEAT_SECONDS
        if alive:
            return True
    return False
