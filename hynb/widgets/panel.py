"""The live view of a run: curves, pace, state, and a button that stops it after a checkpoint."""

from __future__ import annotations

import html
import threading
import time
from typing import Any

import ipywidgets as widgets

from hynb.errors import RunError
from hynb.launch import Run
from hynb.runs import RunReader, RunStatus, effective_events
from hynb.widgets.plot import Curve, image_tag, png
from hynb.widgets.table import STYLE, block, duration_text, path_text

_POLL_SECONDS = 0.5
# Drawing takes this share of a core at most, however slow the machine is.
_DRAWING_SHARE = 0.1
_BAR_STYLES = {"finished": "success", "stopped": "warning", "failed": "danger"}
_WAITING = '<div class="hynb faint"><div class="hynb-wait">The loss appears here after the first step.</div></div>'
_CLASSES = {"finished": "good", "failed": "bad"}


class RunPanel(widgets.VBox):
    """Follows a run in a thread of its own until the run ends or `stop_watching` is called.

    It only reads the run folder: closing it, or the kernel's end, leaves the run alone.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._header = widgets.HTML()
        self._bar = widgets.IntProgress(min=0, max=1, layout={"width": "100%", "max_width": "900px"})
        self._plot = widgets.HTML(_WAITING)
        self._saved = widgets.HTML()
        self._failure = widgets.HTML()
        self.stop_button = widgets.Button(
            description="Stop",
            icon="stop",
            tooltip="Save a checkpoint after this step, then end the run",
        )
        self.stop_button.on_click(self._stop)
        self._note = widgets.HTML()
        self._shown: dict[str, Any] = {}
        self._end = threading.Event()
        row = widgets.HBox([self.stop_button, self._note])
        row.layout.align_items = "center"
        # A first look in the caller's thread: the cell's output is whole even when nothing more comes.
        self._reader = RunReader(run.output_dir)
        self._events: list[dict[str, Any]] = []
        parts = [self._header, self._bar, row, self._failure, self._plot, self._saved]
        super().__init__([widgets.HTML(STYLE), *parts])
        self._look()
        self._thread = threading.Thread(target=self._watch, name=f"panel {run.output_dir.name}", daemon=True)
        self._thread.start()

    @property
    def watching(self) -> bool:
        """Whether the thread still follows the run."""
        return self._thread.is_alive()

    def stop_watching(self) -> None:
        """Ends the thread; what is shown stays, and the run goes on."""
        self._end.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    def _watch(self) -> None:
        pause = _POLL_SECONDS
        while not self._end.wait(pause):
            started = time.thread_time()
            try:
                live = self._look()
            except RunError as error:
                self._failure.value = f'<div class="hynb bad">{html.escape(str(error))}</div>'
                return
            if not live:
                return
            pause = max(_POLL_SECONDS, (time.thread_time() - started) / _DRAWING_SHARE)

    def _look(self) -> bool:
        """Shows what is new; returns whether the run is still live."""
        # Status first: events written before a run's end are then never missed.
        status = self._reader.status()
        new = self._reader.new_events()
        self._events = effective_events(self._events + new)
        curve = Curve.of(self._events)
        self._header.value = _header(self.run, status, curve)
        self._bar.max, self._bar.value = status.max_steps or 1, status.global_step if status.max_steps else 0
        self._bar.bar_style = _BAR_STYLES.get(status.state, "info")
        self.stop_button.disabled = not status.live or status.state == "stopping"
        drawn = (len(self._events), status.state, status.max_steps)
        if curve.steps and self._shown.get("plot") != drawn:
            self._shown["plot"] = drawn
            picture = png(curve, status.max_steps, transparent=True)
            self._plot.value = image_tag(picture, curve.alt_text(status))
        self._saved.value = saved_text(self.run, self._events)
        if not status.live:
            self._note.value = ""
            self._failure.value = _end_text(self.run, status)
            if not curve.steps:
                self._plot.value = ""
        return status.live

    def _stop(self, _: Any) -> None:
        self.stop_button.disabled = True
        try:
            self.run.stop(wait=False)
        except OSError as error:
            self._note.value = f'<span class="hynb bad">{html.escape(str(error))}</span>'
            return
        self._note.value = '<span class="hynb">Asked: after this step a checkpoint is saved and the run ends.</span>'


def saved_text(run: Run, events: list[dict[str, Any]]) -> str:
    """The checkpoints that are whole, with the time that each took to write."""
    seconds = {event.get("path"): event.get("seconds") for event in events if event["kind"] == "save"}
    items = []
    for path in run.checkpoints():
        took = f" in {seconds[path.name]:g} s" if seconds.get(path.name) is not None else ""
        items.append(f"<code>{path.name}</code>{took}")
    if not items:
        return '<div class="hynb faint">No checkpoint yet.</div>'
    shown = ", ".join(items[-8:])
    more = f"{len(items) - 8} more, " if len(items) > 8 else ""
    return f'<div class="hynb">Saved: {more}{shown} in <code>{html.escape(path_text(run.output_dir))}</code></div>'


def _header(run: Run, status: RunStatus, curve: Curve) -> str:
    state = f'<b class="{_CLASSES.get(status.state, "")}">{status.state}</b>'
    steps = f"step {status.global_step}" + (f" of {status.max_steps}" if status.max_steps else "")
    parts = [f"<code>{html.escape(run.output_dir.name)}</code>: {state}", steps]
    if status.state == "starting":
        parts.append("loading the model; the first loss takes from seconds to many minutes, by its size")
    seconds = curve.seconds_left(status.max_steps)
    if status.live and seconds is not None:
        end = time.strftime("%H:%M", time.localtime(time.time() + seconds))
        parts.append(f"<b>{duration_text(seconds)} left</b>, until about {end}")
    facts = " · ".join(f'<span class="faint">{name}</span> {text}' for name, text in curve.facts(status))
    return f'<div class="hynb">{" · ".join(parts)}<br>{facts}</div>'


def _end_text(run: Run, status: RunStatus) -> str:
    if status.state == "finished":
        return ""
    if status.state != "failed":
        return f'<div class="hynb">{html.escape(status.reason)}</div>'
    folder = html.escape(str(run.dir.log))
    return (
        f'<div class="hynb"><b class="bad">The run failed.</b>{block(status.reason)}'
        f"<details open><summary>The end of its log (all of it: <code>{folder}</code>)</summary>"
        f"{block(run.reader.log_tail(40), scrolls=True)}</details></div>"
    )
