"""The run folder: every file's name, the ranks' writer and the watchers' reader."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from hynb.errors import RunError

EVENT_VERSION = 1
HEARTBEAT_SECONDS = 5.0
# A rank on another host is taken for dead when its heartbeat is this old.
STALE_HEARTBEAT_SECONDS = 90.0

State = Literal["absent", "starting", "running", "stopping", "finished", "stopped", "failed"]
LIVE_STATES = ("starting", "running", "stopping")


class RunDir:
    """Names of every file in a run's output_dir; makes nothing."""

    def __init__(self, output_dir: str | Path) -> None:
        self.path = Path(output_dir).expanduser().absolute()
        self.config = self.path / "run.yaml"
        self.ds_config = self.path / "ds_config.json"
        self.launch = self.path / "launch.json"
        self.exit = self.path / "exit.json"
        self.manifest = self.path / "manifest.json"
        self.events = self.path / "events.jsonl"
        self.heartbeat = self.path / "heartbeat"
        self.status = self.path / "status.json"
        self.stop_request = self.path / "stop_request"
        self.log = self.path / "log"
        self.launcher_log = self.log / "launcher.log"
        self.tensorboard = self.path / "tensorboard"
        self.rejected = self.path / "rejected.jsonl"
        self.rejected_evaluation = self.path / "rejected_evaluation.jsonl"
        self.saving = self.path / "saving"
        self.random_base = self.path / "random_base"
        self.hosts = self.path / "hosts.json"
        self.hostfile = self.path / "hostfile"
        self.deepspeed_env = self.path / "deepspeed_env"
        self.kill_request = self.path / "kill_request"
        self.paste = self.path / "paste_on_hosts.txt"
        self.led_from = self.path / "led_from"

    def secret(self, launch_id: str) -> Path:
        """What the processes of a run over several hosts prove to each other."""
        return self.log / f".secret-{launch_id}"

    def shared_token(self, launch_id: str) -> Path:
        """A file that a host sees only where it shares this folder with the launching host."""
        return self.log / f".shared-{launch_id}"

    def rank_log(self, rank: int) -> Path | None:
        """The newest output file of one rank."""
        return max(self.log.glob(f"*_rank{rank}.log"), default=None)

    def checkpoint(self, global_step: int) -> Path:
        """The folder of one checkpoint, complete or absent."""
        return self.path / f"checkpoint-{global_step}"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest step first."""
        found = [item for item in self.path.glob("checkpoint-*") if re.fullmatch(r"\d+", item.name[11:])]
        return sorted(found, key=lambda item: int(item.name[11:]))

    def rank_logs(self) -> list[Path]:
        """The newest output file of each rank, in the order of the ranks; empty when there is none."""
        newest = {}
        # The launcher begins each name with the time, so that a resumed run's file sorts last.
        for path in sorted(self.log.glob("*_rank*.log")):
            if match := re.search(r"_rank(\d+)\.log$", path.name):
                newest[int(match[1])] = path
        return [newest[rank] for rank in sorted(newest)]

    def failure(self, rank: int) -> Path:
        """What a rank that failed has to say."""
        return self.log / f"failure_rank{rank}.json"

    def failures(self) -> list[dict[str, Any]]:
        """Records of the ranks that failed, the first to fail first."""
        records = [read_json(path) for path in self.log.glob("failure_rank*.json")]
        return sorted((record for record in records if record), key=lambda record: record["time"])

    def run_files(self) -> list[Path]:
        """What a run writes and `overwrite_output_dir` removes; nothing else in the folder is ours."""
        single = [
            *(self.config, self.ds_config, self.launch, self.exit, self.manifest, self.events),
            *(self.heartbeat, self.status, self.stop_request, self.log, self.tensorboard),
            *(self.rejected, self.rejected_evaluation, self.saving, self.random_base),
            *(self.hosts, self.hostfile, self.deepspeed_env, self.kill_request, self.paste, self.led_from),
        ]
        return [item for item in single if item.exists()] + self.checkpoints()


@dataclass(kw_only=True, frozen=True)
class ProcessId:
    """A process known by host, pid and start time, so that a reused pid is not taken for it."""

    host: str
    pid: int
    create_time: float

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """The identity of a process that runs on this host."""
        return cls(host=socket.gethostname(), pid=pid, create_time=psutil.Process(pid).create_time())

    def alive(self) -> bool | None:
        """Whether it runs; None when it belongs to another host, where this one can't look."""
        if self.host != socket.gethostname():
            return None
        try:
            process = psutil.Process(self.pid)
            # The clock's resolution differs between /proc readers by at most a tick.
            same = abs(process.create_time() - self.create_time) < 1.0
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


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


class RunWriter:
    """What rank 0 writes: manifest, events, heartbeat and status."""

    def __init__(self, output_dir: str | Path) -> None:
        self.dir = RunDir(output_dir)
        self.dir.path.mkdir(parents=True, exist_ok=True)
        self._process = ProcessId.of(os.getpid())
        self._status: dict[str, Any] = {}

    def manifest(self, content: dict[str, Any]) -> None:
        """Replaces manifest.json."""
        write_json(self.dir.manifest, content)

    def event(self, kind: str, global_step: int, **content: Any) -> None:
        """Appends one whole line to events.jsonl."""
        record = {"v": EVENT_VERSION, "kind": kind, "global_step": global_step, "time": time.time()}
        line = json.dumps(record | content, ensure_ascii=False, allow_nan=True) + "\n"
        with self.dir.events.open("ab") as file:
            if file.tell() and not _ends_with_newline(self.dir.events):
                line = "\n" + line
            file.write(line.encode())

    def beat(self, global_step: int) -> None:
        """Touches the heartbeat with the step that is being worked on."""
        replace_text(self.dir.heartbeat, f"{global_step}\n")

    def status(
        self,
        state: State,
        *,
        global_step: int | None = None,
        max_steps: int | None = None,
        exit_code: int | None = None,
        reason: str = "",
        **where: Any,
    ) -> None:
        """Replaces status.json; what is not given stays as it was.

        Args:
            where: host and rank of a failure.
        """
        changed = {"state": state, "exit_code": exit_code, "reason": reason, "updated_at": time.time()} | where
        kept = {"global_step": global_step, "max_steps": max_steps}
        self._status |= changed | {name: value for name, value in kept.items() if value is not None}
        write_json(self.dir.status, self._status | {"process": vars(self._process)})


class RunReader:
    """What every watcher reads; writes nothing, so any number of them may look on."""

    def __init__(self, output_dir: str | Path) -> None:
        self.dir = RunDir(output_dir)
        self._offset = 0

    def manifest(self) -> dict[str, Any]:
        """The manifest; empty before the ranks have written it."""
        return read_json(self.dir.manifest) or {}

    def new_events(self) -> list[dict[str, Any]]:
        """Events appended since the last call; a torn last line waits for its rest."""
        try:
            if self.dir.events.stat().st_size < self._offset:
                self._offset = 0
            with self.dir.events.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            self._offset = 0
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return list(_parse_events(whole))

    def events(self) -> list[dict[str, Any]]:
        """All events in force: those that a resumed run did again are left out."""
        return effective_events(RunReader(self.dir.path).new_events())

    def status(self) -> RunStatus:
        """The run's state, from the ranks' record, the launcher's and the processes that are there."""
        if not self.dir.path.is_dir():
            return RunStatus(state="absent", reason=f"there is no folder {self.dir.path}")
        record = read_json(self.dir.status)
        launch = read_json(self.dir.launch)
        ended = read_json(self.dir.exit)
        if record is None and launch is None:
            reason = f"no run was started in {self.dir.path}"
            with contextlib.suppress(OSError):
                leader = self.dir.led_from.read_text().strip()
                reason = f"{self.dir.path} is this host's part of a run that is led from {leader}: look there"
            return RunStatus(state="absent", reason=reason)
        record = record or {"state": "starting"}
        if record["state"] == "starting" and not record.get("reason"):
            record = record | {"reason": self._joining()}
        known = {
            "global_step": max(record.get("global_step") or 0, self._heartbeat_step()),
            "max_steps": record.get("max_steps"),
            "exit_code": record.get("exit_code"),
            "reason": record.get("reason", ""),
            "host": record.get("host"),
            "rank": record.get("rank"),
            "updated_at": record.get("updated_at"),
        }
        # In a run over several hosts the supervisor has weighed what each of them said.
        if record["state"] == "failed" and "host" not in record:
            known["reason"] = self._failure() or known["reason"]
        if record["state"] not in LIVE_STATES:
            return RunStatus(state=record["state"], **known)
        if self._processes_alive(record, launch if ended is None else None):
            asked = self.dir.stop_request.exists() and record["state"] != "starting"
            return RunStatus(state="stopping" if asked else record["state"], **known)
        ended = ended or {}
        reason = ended.get("reason") or "its processes are gone and left no record: killed, or out of memory"
        reason = reason if "host" in ended else self._failure() or reason
        known |= {"exit_code": ended.get("exit_code"), "reason": reason}
        known |= {"host": ended.get("host"), "rank": ended.get("rank")}
        return RunStatus(state=ended.get("state", "failed"), **known)

    def log_tail(self, lines: int = 30) -> str:
        """The end of rank 0's output, or of the launcher's where no rank has written yet."""
        for path in [*self.dir.rank_logs()[:1], self.dir.launcher_log]:
            with contextlib.suppress(OSError):
                text = path.read_bytes()[-200_000:].decode(errors="replace")
                # A progress bar's carriage returns would show as one endless line.
                tail = [line.rsplit("\r", 1)[-1] for line in text.splitlines()][-lines:]
                if any(line.strip() for line in tail):
                    return "\n".join(tail)
        return ""

    def _failure(self) -> str:
        """The first cause among what the failed ranks said; empty when none said anything."""
        failures = self.dir.failures()
        causes = [failure for failure in failures if not failure.get("lost_connection")]
        if causes:
            return f"rank {causes[0]['rank']} on {causes[0]['host']}: {causes[0]['reason']}"
        if not failures:
            return ""
        silent = set(range(self.manifest().get("world_size", 0))) - {failure["rank"] for failure in failures}
        who = f"rank {', '.join(map(str, sorted(silent)))}" if silent else "another rank"
        return f"{who} ended without a word (killed, or out of memory), and the others lost their connection to it"

    def _joining(self) -> str:
        """How far the hosts of a run over several have come; empty for other runs."""
        known = read_json(self.dir.hosts) or {}
        if folder := known.get("output_dir"):
            return f"all hosts have joined; output_dir is {folder}"
        waiting = [host["name"] for host in known.get("hosts", []) if host["state"] == "waiting"]
        if not waiting:
            return ""
        lines = f"; the lines to paste there are in {self.dir.paste}" if self.dir.paste.exists() else ""
        return f"waiting for {', '.join(waiting)} to join{lines}"

    def _heartbeat_step(self) -> int:
        try:
            return int(self.dir.heartbeat.read_text())
        except (OSError, ValueError):
            return 0

    def _processes_alive(self, record: dict[str, Any], launch: dict[str, Any] | None) -> bool:
        for process in (item["process"] for item in (record, launch) if item and "process" in item):
            alive = ProcessId(**process).alive()
            if alive is None:
                with contextlib.suppress(OSError):
                    alive = time.time() - self.dir.heartbeat.stat().st_mtime < STALE_HEARTBEAT_SECONDS
            if alive:
                return True
        return False


def effective_events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events without those steps that a later resume went back behind."""
    kept: list[dict[str, Any]] = []
    for event in events:
        if event["kind"] == "resume":
            kept = [old for old in kept if old["kind"] in ("start", "resume") or _before(old, event)]
        kept.append(event)
    return kept


def progress_line(event: dict[str, Any], max_steps: int | None) -> str:
    """One log event as a line for a terminal."""
    step = f"step {event['global_step']}" + (f"/{max_steps}" if max_steps else "")
    parts = [f"loss {event['loss']:.4f}", f"lr {event['learning_rate']:.3g}"]
    if event.get("grad_norm") is not None:
        parts.append(f"grad norm {event['grad_norm']:.3g}")
    parts.append(f"{event['tokens_per_second']:.0f} tokens/s")
    if max_steps:
        left = event["step_seconds"] * (max_steps - event["global_step"])
        parts.append("left " + time.strftime("%H:%M:%S", time.gmtime(left)))
    return f"{step}  " + "  ".join(parts)


def evaluation_line(event: dict[str, Any]) -> str:
    """One evaluation event as a line for a terminal."""
    return (
        f"evaluation at step {event['global_step']}: loss {event['eval_loss']:.4f} over {event['eval_tokens']:,} "
        f"tokens, perplexity {event['eval_perplexity']:.4g}, {event['eval_seconds']:g} s"
    )


def check_output_dir(output_dir: str | Path, *, overwrite: bool, resuming: bool) -> list[str]:
    """Why a new run must not start in this folder, one message a reason; empty when it may."""
    run_dir = RunDir(output_dir)
    if run_dir.path.exists() and not run_dir.path.is_dir():
        return [f"output_dir = {output_dir}: is a file; name a folder"]
    status = RunReader(run_dir.path).status()
    if status.live:
        return [
            f"output_dir = {output_dir}: a run is {status}. Watch it with `hynb attach {output_dir}`, "
            f"end it with `hynb stop {output_dir}`, or choose another output_dir"
        ]
    if status.state != "absent" and not overwrite and not resuming:
        return [
            f"output_dir = {output_dir}: holds an earlier run ({status.state}). Go on from it with "
            "resume_from_checkpoint: last, remove it with overwrite_output_dir, or choose another output_dir"
        ]
    return []


def read_json(path: Path) -> dict[str, Any] | None:
    """A snapshot file's content; None when it is absent.

    Raises:
        RunError: when it is no JSON, which no writer of ours leaves behind.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); remove it, or the whole run folder") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces a snapshot file at once: a reader sees the old content or the new."""
    replace_text(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Replaces a text file at once."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _before(old: dict[str, Any], resume: dict[str, Any]) -> bool:
    return old["global_step"] <= resume["global_step"] and old["kind"] not in ("stop", "end")


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _parse_events(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.splitlines():
        # A writer that died in mid-line left a torn one; its successor began a new line.
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and event.get("v") == EVENT_VERSION:
                yield event
