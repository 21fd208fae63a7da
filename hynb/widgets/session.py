"""A run in a notebook: started or found again, watched, and waited for."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from hynb.config import Config, absolute_paths, load_yaml
from hynb.errors import RunFailedError
from hynb.launch import Run, attach, launch
from hynb.runs import RunDir, RunReader, RunStatus, evaluation_line, notice_line, progress_line, saved_line
from hynb.widgets.panel import RunPanel
from hynb.widgets.result import show_result
from hynb.widgets.table import path_text

# The output of a long run: about this many progress lines, and one per minute if the steps are slow.
_LINES, _LINE_SECONDS = 25, 60.0
_POLL_SECONDS = 0.5

# What this kernel has started and shows, by run folder, so that a cell that runs again finds its own run.
_started: dict[Path, Config] = {}
_panels: dict[Path, RunPanel] = {}


def start_or_attach(config: Config) -> Run:
    """Starts the run of a Config, or attaches to it if it was started before.

    A live run in `output_dir` is attached to, and so is one that has ended and was started with the same values. A
    stopped or failed run is resumed if `resume_from_checkpoint` is set; a run of an earlier kernel is replaced if
    `overwrite_output_dir` is set.

    Raises:
        ConfigError: everything that `launch` refuses, such as other values for a folder that already has a run.
    """
    config = absolute_paths(config)
    folder = Path(config.output_dir)
    status = RunReader(folder).status()
    if status.state == "absent" or not _is_attached_to(config, status):
        run = launch(config)
        _started[folder] = config
        print(f"started in {path_text(folder)}: it goes on when this notebook is closed")
        if lines := run.paste_lines():
            print(f"to join the other hosts, run one of these lines on each:\n{lines}", end="")
        return run
    saved = RunDir(folder).config
    if status.live and saved.is_file() and (differences := _differences(config, load_yaml(saved))):
        print(f"attached to the live run in {path_text(folder)}, which has other values: {differences}")
    else:
        print(f"attached to the run in {path_text(folder)}: {status}")
    return attach(folder)


def watch(run: Run) -> RunPanel:
    """A live panel of a run; an earlier panel of the same run in this kernel is closed."""
    if run.output_dir in _panels:
        old = _panels.pop(run.output_dir)
        old.stop_watching()
        old.close()
    panel = _panels[run.output_dir] = RunPanel(run)
    return panel


async def finished(run: Run) -> RunStatus:
    """Waits for a run's end and prints a line of progress now and then; the panel's button works meanwhile.

    Interrupting the cell ends the waiting, not the run.

    Raises:
        RunFailedError: with the reason and the end of the log.
    """
    printer = _Printer()
    reader = RunReader(run.output_dir)
    while True:
        # The status first: events that are written before a run's end are then never missed.
        status = reader.status()
        printer.show(status, reader.new_events())
        if not status.live:
            break
        await asyncio.sleep(_POLL_SECONDS)
    printer.show_last(status)
    try:
        status = await asyncio.to_thread(run.wait, check=True)
    except RunFailedError:
        show_result(run)
        raise
    print(status, flush=True)
    return status


class _Printer:
    """Prints a run's states and events as plain lines, and of many log events only some."""

    def __init__(self) -> None:
        self._shown: tuple[str, str | None] | None = None
        self._step = 0
        self._time = time.monotonic()
        self._pending: dict[str, Any] | None = None

    def show(self, status: RunStatus, events: list[dict[str, Any]]) -> None:
        """Prints what is new."""
        # Before the first step every phase is printed, later only a change of the state.
        shown = (status.state, status.phase if status.state == "starting" else None)
        if status.live and shown != self._shown:
            self._shown = shown
            print(status, flush=True)
        for event in events:
            if event["kind"] == "save":
                print(saved_line(event), flush=True)
            elif event["kind"] == "eval":
                print(evaluation_line(event), flush=True)
            elif line := notice_line(event):
                print(line, flush=True)
            elif event["kind"] == "log":
                self._show_log(event, status)

    def show_last(self, status: RunStatus) -> None:
        """Prints the newest log event if it was left out."""
        if self._pending is not None:
            print(progress_line(self._pending, status.max_steps), flush=True)

    def _show_log(self, event: dict[str, Any], status: RunStatus) -> None:
        self._pending = event
        is_due = event["global_step"] - self._step >= (status.max_steps or 0) / _LINES
        if is_due or time.monotonic() - self._time > _LINE_SECONDS:
            print(progress_line(event, status.max_steps), flush=True)
            self._step, self._time, self._pending = event["global_step"], time.monotonic(), None


def _is_attached_to(config: Config, status: RunStatus) -> bool:
    """Whether the run that is in output_dir is the one that the Config means."""
    if status.live:
        return True
    run_dir = RunDir(config.output_dir)
    if not run_dir.config.is_file() or _differences(config, load_yaml(run_dir.config)):
        return False
    if status.state != "finished" and (config.resume_from_checkpoint or config.overwrite_output_dir):
        return False
    return not config.overwrite_output_dir or _started.get(run_dir.path) == config


def _differences(config: Config, other: Config) -> str:
    """The parameters whose values differ, as text; empty when none differ."""
    ours, theirs = (item.values() | {"training_args": item.training_args} for item in (config, other))
    return ", ".join(
        f"{name} = {theirs[name]} (here {value})"
        for name, value in ours.items()
        if value != theirs[name] and name != "overwrite_output_dir"
    )
