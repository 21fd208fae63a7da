"""The state of a run, derived from its folder and its processes."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hynb.files import is_there
from hynb.runs.folder import RunDir
from hynb.runs.heartbeat import Beat, Phase, disk_time, read_heartbeat
from hynb.runs.process import ProcessId
from hynb.runs.records import State, read_record
from hynb.runs.watchdog import watchdog_abort

# A process on another host is considered dead when the heartbeat is this old: network disks cache for up to a minute.
STALE_HEARTBEAT_SECONDS = 90.0
LIVE_STATES = ("starting", "running", "stopping")
_NO_RECORD = (
    "its processes are gone and recorded no reason: killed, or the host was restarted, or output_dir could not be "
    "written"
)


@dataclass(kw_only=True, frozen=True)
class RunStatus:
    """What is known of a run, derived from its files alone.

    Args:
        phase: what rank 0 of a live run does.
        progress: how far that phase is; empty where nothing is known.
        host: the host where a run failed, by its name in the hostfile, if the failure belongs to one host.
        rank: the rank that failed, if the failure belongs to one rank.
        skipped_steps: steps that were left out because a loss or gradient was not finite.
        terminated: the run was stopped because one of its processes got SIGTERM.
        updated_at: time of the last change of status.json, in seconds since the epoch.
    """

    state: State
    phase: Phase | None = None
    progress: str = ""
    global_step: int = 0
    max_steps: int | None = None
    exit_code: int | None = None
    reason: str = ""
    host: str | None = None
    rank: int | None = None
    skipped_steps: int = 0
    terminated: bool = False
    updated_at: float | None = None

    @property
    def live(self) -> bool:
        """Whether the run's processes are there."""
        return self.state in LIVE_STATES

    def __str__(self) -> str:
        text: str = self.state
        if self.global_step:
            text += f", step {self.global_step}" + (f" of {self.max_steps}" if self.max_steps else "")
        if self.skipped_steps:
            text += f", {self.skipped_steps} step{'s' * (self.skipped_steps > 1)} left out (not finite)"
        # A run that is starting in the phase "starting", or running in "training", does what one expects.
        if self.phase and (self.state, self.phase) not in (("starting", "starting"), ("running", "training")):
            text += f", {self.phase}" + (f" ({self.progress})" if self.progress else "")
        return text + (f": {self.reason}" if self.reason else "")


def read_status(run_dir: RunDir) -> RunStatus:
    """The run's state, from the records of the ranks and of the supervisor and from the processes that are alive.

    Raises:
        RunError: a record cannot be read or is damaged; the message names the file and the field.
    """
    if not run_dir.path.is_dir():
        return RunStatus(state="absent", reason=f"there is no folder {run_dir.path}")
    record, launch = read_record(run_dir.status), read_record(run_dir.launch)
    if record is None and launch is None:
        return RunStatus(state="absent", reason=_absent_reason(run_dir))
    record = record or {"state": "starting"}
    beat = read_heartbeat(run_dir.heartbeat)
    status = _recorded_status(run_dir, record, beat)
    end = _end_of(run_dir, launch)
    if end is None and may_go_on(run_dir, record) and _may_start_again(run_dir, launch):
        reason = f"{status.state}, and may start again by itself (max_restarts): {status.reason}"
        return dataclasses.replace(status, state="starting", reason=reason)
    if not status.live:
        return status
    original = original_folder(run_dir) if end is None else None
    if original:
        reason = f"this folder is a copy of {original}, made while that run was live: look there"
        return dataclasses.replace(status, state="failed", phase=None, progress="", reason=reason)
    # The supervisor ends all ranks before it writes its record.
    if _is_alive(run_dir.path, record, launch if end is None else None, beat if end is None else None):
        stopping = is_there(run_dir.stop_request) and status.state != "starting"
        return dataclasses.replace(status, state="stopping") if stopping else status
    return _unreported_end(run_dir, status, end or {})


def may_go_on(run_dir: RunDir, record: dict[str, Any]) -> bool:
    """Whether an ended run is one for `max_restarts`: failed, or its ranks got SIGTERM and nobody has stopped it.

    Args:
        record: the content of status.json, or the supervisor's record of the end.
    """
    return record["state"] == "failed" or bool(record.get("terminated") and not is_there(run_dir.stop_request))


def _end_of(run_dir: RunDir, launch: dict[str, Any] | None) -> dict[str, Any] | None:
    """The supervisor's record of the end of this launch; None where it has written none."""
    end = read_record(run_dir.exit)
    # A supervisor that was out of sight may end after the next launch into its folder.
    is_of_another = end is not None and end.get("id") not in (None, (launch or {}).get("id"))
    return None if is_of_another else end


def _may_start_again(run_dir: RunDir, launch: dict[str, Any] | None) -> bool:
    """Whether the supervisor of a failed run has yet to decide about a restart."""
    if launch is None or not launch.get("restarts_left"):
        return False
    alive = ProcessId.from_record(launch["process"]).alive()
    if alive is not None:
        return alive
    # From another machine it is not seen: it decides within the time in which hosts have to answer.
    return disk_time(run_dir.path) - run_dir.status.stat().st_mtime < _start_seconds(launch)


def _start_seconds(launch: dict[str, Any]) -> float:
    """Time in which hosts have to answer, after which a supervisor on another machine has written something."""
    return launch.get("membership", {}).get("start_seconds", 0.0) + STALE_HEARTBEAT_SECONDS


def original_folder(run_dir: RunDir) -> Path | None:
    """The folder of the run that a folder was copied from; None where it is the run's own, or was moved.

    Raises:
        RunError: launch.json is damaged.
    """
    recorded = (read_record(run_dir.launch) or {}).get("membership", {}).get("run_folder")
    if recorded is None:
        return None
    try:
        # One folder may have several paths, by links and mounts.
        is_own = Path(recorded).stat().st_ino == run_dir.path.stat().st_ino
    except (OSError, ValueError):
        return None
    return None if is_own else Path(recorded)


def _absent_reason(run_dir: RunDir) -> str:
    with contextlib.suppress(OSError):
        launching_host = run_dir.led_from.read_text(encoding="utf-8").strip()
        return f"{run_dir.path} is this host's part of a run that was launched on {launching_host}: look there"
    return f"no run was started in {run_dir.path}"


def _recorded_status(run_dir: RunDir, record: dict[str, Any], beat: Beat | None) -> RunStatus:
    """The status as rank 0, or after a failure the supervisor, has written it."""
    state, reason = record["state"], record.get("reason", "")
    if state == "starting" and not reason:
        reason = _joining(run_dir)
    # A record with a host is the supervisor's, who has compared the reports of all ranks.
    if state == "failed" and "host" not in record:
        reason = _failure(run_dir) or reason
    phase = record.get("phase") or (beat.phase if beat else None)
    return RunStatus(
        state=state,
        phase=phase if state in LIVE_STATES else None,
        progress=beat.progress if beat and beat.phase == phase and state in LIVE_STATES else "",
        global_step=max(record.get("global_step") or 0, beat.global_step if beat else 0),
        max_steps=record.get("max_steps"),
        exit_code=record.get("exit_code"),
        reason=reason,
        host=record.get("host"),
        rank=record.get("rank"),
        skipped_steps=record.get("skipped_steps") or 0,
        terminated=record.get("terminated", False),
        updated_at=record.get("updated_at"),
    )


def _is_alive(folder: Path, record: dict[str, Any], launch: dict[str, Any] | None, beat: Beat | None) -> bool:
    """Whether rank 0 or the supervisor is alive; on another host, as far as the heartbeat shows."""
    for item in (record, launch):
        if item is None or "process" not in item:
            continue
        alive = ProcessId.from_record(item["process"]).alive()
        if alive is None and beat is not None:
            alive = disk_time(folder) - beat.time < STALE_HEARTBEAT_SECONDS
        elif alive is None and item is launch:
            alive = _is_starting(folder, item)
        if alive:
            return True
    return False


def _is_starting(folder: Path, launch: dict[str, Any]) -> bool:
    """Whether rank 0 of a launch, which has no heartbeat yet, may still be about to begin."""
    return disk_time(folder) - RunDir(folder).launch.stat().st_mtime < _start_seconds(launch)


def _unreported_end(run_dir: RunDir, status: RunStatus, end: dict[str, Any]) -> RunStatus:
    """The status of a run whose ranks did not record their end.

    Args:
        end: the supervisor's record in exit.json; empty when it wrote none.
    """
    reason = end.get("reason") or _NO_RECORD
    is_explained = "host" in end or end.get("state") == "stopped"
    return dataclasses.replace(
        status,
        state=end.get("state", "failed"),
        phase=None,
        progress="",
        exit_code=end.get("exit_code"),
        terminated=end.get("terminated", False),
        reason=reason if is_explained else _failure(run_dir) or reason,
        host=end.get("host"),
        rank=end.get("rank"),
    )


def _failure(run_dir: RunDir) -> str:
    """The first cause among the reports of failed ranks; empty when there are none."""
    failures = run_dir.failures()
    causes = [failure for failure in failures if not failure.get("lost_connection")]
    abort = watchdog_abort(run_dir)
    if abort:
        # What ranks report that have waited in vain comes of that.
        causes = [failure for failure in causes if failure["rank"] not in abort.waiting]
    if causes and causes[0].get("late"):
        return causes[0]["reason"]
    if causes:
        return f"rank {causes[0]['rank']} on {causes[0]['host']}: {causes[0]['reason']}"
    if abort:
        return abort.reason
    if not failures:
        return ""
    world_size = (read_record(run_dir.manifest) or {}).get("world_size", 0)
    silent = sorted(set(range(world_size)) - {failure["rank"] for failure in failures})
    who = f"rank {', '.join(map(str, silent))}" if silent else "another rank"
    return f"{who} ended and reported no reason (killed by a signal), and the other ranks lost its connection"


def _joining(run_dir: RunDir) -> str:
    """Which of several hosts have not joined yet, or that all have; empty for a run on one host."""
    record = read_record(run_dir.hosts) or {}
    if len(record.get("hosts", [])) < 2:
        return ""
    if folder := record.get("output_dir"):
        return f"all hosts have joined; output_dir is {folder}"
    waiting = [host["name"] for host in record.get("hosts", []) if host["state"] == "waiting"]
    if not waiting:
        return ""
    lines = f"; the lines to paste there are in {run_dir.paste}" if run_dir.paste.exists() else ""
    return f"waiting for {', '.join(waiting)} to join{lines}"
