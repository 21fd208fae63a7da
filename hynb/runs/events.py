"""What rank 0 writes into a run folder while it trains, and how every watcher reads it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hynb.files import is_full, write_json
from hynb.runs.folder import RunDir
from hynb.runs.heartbeat import Heartbeat, Phase
from hynb.runs.process import ProcessId
from hynb.runs.records import State, read_record
from hynb.runs.status import LIVE_STATES, RunStatus, read_status

EVENT_VERSION = 1
# A new step alone is written no more often; the heartbeat has it too.
_STATUS_SECONDS = 1.0
# Longer than any one event.
_TAIL_BYTES = 1 << 20
# What is read of a long file for its last events, even where few lines are whole.
_LARGEST_TAIL_BYTES = 1 << 26
# Among so many events at the end there is a log event: evaluations and statistics are rarer than steps.
_SEARCHED = 50
_LARGEST_NUMBER = 1 << 63
_LOG_TAIL_BYTES = 200_000
# Events that wait for space, about half a kilobyte each.
_MOST_UNWRITTEN = 100_000
_RETRY_SECONDS = 1.0


class RunWriter:
    """Writes manifest, events, status and heartbeat of a run.

    Attributes:
        outlives_full_disk: what does not fit on the disk is no error; events are written once there is space.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.outlives_full_disk = False
        # Kind and line.
        self._unwritten: list[tuple[str, str]] = []
        self.dir = RunDir(output_dir)
        self.dir.create()
        self._process = ProcessId.of(os.getpid())
        self._status: dict[str, Any] = {}
        self._status_at = -_STATUS_SECONDS
        self._heartbeat: Heartbeat | None = None

    def start(self) -> None:
        """Rank 0's first act: writes the status `starting`, and a heartbeat from now until `close`."""
        self._heartbeat = Heartbeat(self.dir.heartbeat)
        self.phase("starting")

    def close(self) -> None:
        """Rank 0's last act: ends the heartbeat."""
        if self._heartbeat:
            self._heartbeat.stop()

    def manifest(self, content: dict[str, Any]) -> None:
        """Replaces manifest.json."""
        write_json(self.dir.manifest, content)

    def event(self, kind: str, global_step: int, **content: Any) -> None:
        """Appends one whole line to events.jsonl."""
        record = {"v": EVENT_VERSION, "kind": kind, "global_step": global_step, "time": time.time()}
        self._unwritten.append((kind, json.dumps(record | content, ensure_ascii=False, allow_nan=True) + "\n"))
        try:
            self._append_unwritten()
        except OSError as error:
            if not self._survives(error):
                raise
            if len(self._unwritten) > _MOST_UNWRITTEN:
                self._thin_out()

    def settle(self) -> None:
        """Waits until all events and the status are on a disk that may be full; called at a run's good end."""
        while self.outlives_full_disk:
            try:
                self._append_unwritten()
                self._put_status()
            except OSError as error:
                if not self._survives(error):
                    raise
                time.sleep(_RETRY_SECONDS)
            else:
                return

    def _thin_out(self) -> None:
        """Leaves out every other one of the events that come with each log step."""
        counts: Counter[str] = Counter()
        kept = []
        for kind, line in self._unwritten:
            counts[kind] += 1
            if kind not in ("log", "moe") or counts[kind] % 2:
                kept.append((kind, line))
        self._unwritten = kept

    def _append_unwritten(self) -> None:
        # Unbuffered, so that it is known which lines are in the file where the disk becomes full.
        with self.dir.events.open("ab", buffering=0) as file:
            if file.tell() and not _ends_with_newline(self.dir.events):
                file.write(b"\n")
            while self._unwritten:
                data = self._unwritten[0][1].encode()
                while data:
                    data = data[file.write(data) :]
                del self._unwritten[0]

    def _survives(self, error: OSError) -> bool:
        return self.outlives_full_disk and is_full(error)

    def phase(self, phase: Phase) -> None:
        """Records what rank 0 does from now on, in the heartbeat and in status.json."""
        if self._heartbeat:
            self._heartbeat.update(phase=phase)
        self._write_status({"state": self._status.get("state", "starting"), "phase": phase})

    def step(self, global_step: int) -> None:
        """Records the last completed step in the heartbeat; cheap enough for every step."""
        if self._heartbeat:
            self._heartbeat.update(global_step=global_step)

    def progress(self, text: str) -> None:
        """Records how far the present phase is, such as "312 of 777 GB, 4.1 GB/s"."""
        if self._heartbeat:
            self._heartbeat.update(progress=text)

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
        """Replaces status.json; a step count that is not given stays as it was.

        Where only the step has changed, the file is replaced at most once per second.

        Args:
            where: host and rank of a failure.
        """
        changed = {"state": state, "exit_code": exit_code, "reason": reason} | where
        if state not in LIVE_STATES:
            changed["phase"] = None
        counts = {"global_step": global_step, "max_steps": max_steps}
        self._write_status(changed | {name: value for name, value in counts.items() if value is not None})

    def _write_status(self, changed: dict[str, Any]) -> None:
        before, now = self._status, time.monotonic()
        self._status = before | changed | {"updated_at": time.time()}
        steps = {"global_step", "updated_at"}
        others_changed = any(before.get(name) != value for name, value in changed.items() if name not in steps)
        if not others_changed and now - self._status_at < _STATUS_SECONDS:
            return
        self._status_at = now
        try:
            self._put_status()
        except OSError as error:
            if not self._survives(error):
                raise

    def _put_status(self) -> None:
        write_json(self.dir.status, self._status | {"process": self._process.record()})


class RunReader:
    """Reads a run folder and writes nothing, so that any number of readers may watch a run."""

    def __init__(self, output_dir: str | Path) -> None:
        self.dir = RunDir(output_dir)
        self._offset = 0

    def manifest(self) -> dict[str, Any]:
        """The content of manifest.json; empty before rank 0 has written it."""
        return read_record(self.dir.manifest) or {}

    def new_events(self) -> list[dict[str, Any]]:
        """Events appended since the last call; an incomplete last line is left for the next call."""
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

    def recent_events(self, count: int) -> list[dict[str, Any]]:
        """The last events in force, read from the end of the file; `new_events` goes on after them."""
        size, window = 0, _TAIL_BYTES // 16
        found: list[dict[str, Any]] = []
        with contextlib.suppress(FileNotFoundError), self.dir.events.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            while True:
                file.seek(max(0, size - window))
                data = file.read(window)
                whole = data[: data.rfind(b"\n") + 1]
                found = effective_events(list(_parse_events(whole)))
                if len(found) >= count or window >= min(size, _LARGEST_TAIL_BYTES):
                    break
                window *= 4
            self._offset = max(0, size - window) + len(whole)
        return found[-count:]

    def last_log(self) -> dict[str, Any] | None:
        """The last log event in force; None where there is none near the end of the file."""
        reader = RunReader(self.dir.path)
        return next((event for event in reversed(reader.recent_events(_SEARCHED)) if event["kind"] == "log"), None)

    def events(self) -> list[dict[str, Any]]:
        """All events, without those of steps that a resumed run has repeated."""
        return effective_events(RunReader(self.dir.path).new_events())

    def status(self) -> RunStatus:
        """The run's state now."""
        return read_status(self.dir)

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of rank 0's output, or of the launcher's output when no rank has written any."""
        for path in [*self.dir.rank_logs()[:1], self.dir.launcher_log]:
            with contextlib.suppress(OSError):
                with path.open("rb") as file:
                    file.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
                    text = file.read().decode(errors="replace")
                # A progress bar's carriage returns would show as one endless line.
                tail = [line.rsplit("\r", 1)[-1] for line in text.splitlines()][-lines:]
                if any(line.strip() for line in tail):
                    return "\n".join(tail)
        return ""


def last_events(path: Path) -> list[dict[str, Any]]:
    """The events at the end of a file of events; empty if there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return list(_parse_events(file.read()))
    except FileNotFoundError:
        return []


def effective_events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events without those of steps that a later resume has repeated."""
    kept: list[dict[str, Any]] = []
    for event in events:
        if event["kind"] == "resume":
            kept = [old for old in kept if old["kind"] in ("start", "resume", "restart") or _before(old, event)]
        kept.append(event)
    return kept


def progress_line(event: dict[str, Any], max_steps: int | None) -> str:
    """One log event as one line of text."""
    step = f"step {event['global_step']}" + (f"/{max_steps}" if max_steps else "")
    shown = {"loss": "loss {:.4f}", "learning_rate": "lr {:.3g}", "grad_norm": "grad norm {:.3g}"}
    shown["tokens_per_second"] = "{:.0f} tokens/s"
    numbers = {name: event_number(event.get(name)) for name in (*shown, "step_seconds")}
    parts = [text.format(numbers[name]) for name, text in shown.items() if numbers[name] is not None]
    seconds = numbers["step_seconds"]
    if max_steps and seconds is not None and math.isfinite(left := seconds * (max_steps - event["global_step"])):
        parts.append(f"left {duration_text(left)}")
    return "  ".join([step, *parts])


def duration_text(seconds: float) -> str:
    """A duration, such as 45 s, 12 min 5 s, 3 h 20 min or 2.3 days."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours} h {rest // 60} min" if hours < 48 else f"{hours / 24:.1f} days"


def evaluation_line(event: dict[str, Any]) -> str:
    """One evaluation event as one line of text."""
    shown = {"eval_loss": "loss {:.4f}", "eval_tokens": "over {:,.0f} tokens", "eval_perplexity": "perplexity {:.4g}"}
    shown["eval_seconds"] = "{:g} s"
    numbers = {name: event_number(event.get(name)) for name in shown}
    parts = [text.format(numbers[name]) for name, text in shown.items() if numbers[name] is not None]
    return f"evaluation at step {event['global_step']}: {', '.join(parts).replace(', over', ' over')}"


def saved_line(event: dict[str, Any]) -> str:
    """One save event as one line of text."""
    whole = f", whole after {event['whole_seconds']} s" if "whole_seconds" in event else ""
    return f"saved {event.get('path')} in {event.get('seconds')} s{whole}"


def event_number(value: Any) -> float | None:
    """A number of an event; None for what a damaged line has in its place."""
    is_number = type(value) is float or (type(value) is int and abs(value) < _LARGEST_NUMBER)
    return float(value) if is_number else None


def notice_line(event: dict[str, Any]) -> str:
    """What a person should know, such as a step or checkpoint that was left out, as one line; empty for others."""
    if event["kind"] in ("skipped", "not_saved"):
        return str(event.get("reason"))
    if event["kind"] == "straggler":
        return f"slow: {event.get('text')}"
    if event["kind"] == "spike":
        limit = f"limit {event.get('limit')}, usual {event.get('usual_loss')}"
        return f"step {event['global_step']}: the loss has a spike: {event.get('loss')} ({limit})"
    if event["kind"] == "loss_jump":
        limit = f"limit {event.get('limit')}, usual {event.get('usual_loss')}"
        return (
            f"step {event['global_step']}: the first losses after the resume, {event.get('losses')}, are far above "
            f"those before it ({limit}): see what has changed in the event of the resume"
        )
    if event["kind"] == "restart":
        lost = event.get("lost_hosts")
        without = f", without {', '.join(map(str, lost))}" if isinstance(lost, list) and lost else ""
        begin = f"{event.get('checkpoint') or 'the beginning'}{without}"
        return f"restart {event.get('number')} from {begin}, after step {event['global_step']}: {event.get('reason')}"
    return ""


def _is_whole(event: dict[str, Any]) -> bool:
    step = event.get("global_step")
    return isinstance(event.get("kind"), str) and type(step) is int and abs(step) < _LARGEST_NUMBER


def _before(old: dict[str, Any], resume: dict[str, Any]) -> bool:
    return old["global_step"] <= resume["global_step"] and old["kind"] not in ("stop", "end")


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _parse_events(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.splitlines():
        # A writer that died within a line left it incomplete; its successor began a new one.
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict) and event.get("v") == EVENT_VERSION and _is_whole(event):
                yield event
