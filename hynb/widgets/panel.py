"""The live view of a run: plot, pace, state and phase, and a button that stops the run after a checkpoint."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets

from hynb.errors import RunError
from hynb.launch import Run
from hynb.runs import RunReader, RunStatus, duration_text, effective_events
from hynb.widgets.curve import Curve
from hynb.widgets.markup import STYLE, Kind, block, element, note
from hynb.widgets.plot import image_tag, png
from hynb.widgets.table import path_text

_POLL_SECONDS = 0.5
# The largest share of a core that drawing may take, however slow the machine is.
_DRAWING_SHARE = 0.1
_SHOWN_CHECKPOINTS = 8
_SHOWN_LOG_LINES = 40
_BAR_STYLES = {"finished": "success", "stopped": "warning", "failed": "danger"}
_STATE_KINDS: dict[str, Kind] = {"finished": "good", "failed": "bad"}
_NO_LOSS_YET = (
    '<div class="hynb faint"><div class="hynb-wait">The loss appears here after the first step.</div></div>'
)


class RunPanel(widgets.VBox):
    """Follows a run in a thread of its own until the run ends or `stop_watching` is called.

    It only reads the run folder: the run goes on when the panel is closed or the kernel ends.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._header = widgets.HTML()
        self.bar = widgets.IntProgress(min=0, max=1, layout={"width": "100%", "max_width": "900px"})
        self._plot = widgets.HTML(_NO_LOSS_YET)
        self._saved = widgets.HTML()
        self._end_note = widgets.HTML()
        self.stop_button = widgets.Button(
            description="Stop",
            icon="stop",
            tooltip="Save a checkpoint after this step, then end the run",
        )
        self.stop_button.on_click(self._stop)
        self._stop_note = widgets.HTML()
        row = widgets.HBox([self.stop_button, self._stop_note])
        row.layout.align_items = "center"
        parts = [self._header, self.bar, row, self._end_note, self._plot, self._saved]
        super().__init__([widgets.HTML(STYLE), *parts])
        self._reader = RunReader(run.output_dir)
        self._events: list[dict[str, Any]] = []
        self._drawn: tuple[int, str, int | None] | None = None
        self._stopped_watching = threading.Event()
        # Once in the caller's thread, so that the output of the cell is complete even if the run has ended.
        self._show_news()
        self._thread = threading.Thread(target=self._watch, name=f"panel {run.output_dir.name}", daemon=True)
        self._thread.start()

    @property
    def watching(self) -> bool:
        """Whether the thread still follows the run."""
        return self._thread.is_alive()

    def stop_watching(self) -> None:
        """Ends the thread; what is shown stays, and the run goes on."""
        self._stopped_watching.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    def _watch(self) -> None:
        pause = _POLL_SECONDS
        while not self._stopped_watching.wait(pause):
            started = time.thread_time()
            if not self._show_news():
                return
            pause = max(_POLL_SECONDS, (time.thread_time() - started) / _DRAWING_SHARE)

    def _show_news(self) -> bool:
        """Shows what is new, or which record is damaged; returns whether there may be more."""
        try:
            return self._update()
        except RunError as error:
            self._end_note.value = note(error, "bad")
            self.stop_button.disabled = True
            return False

    def _update(self) -> bool:
        """Shows what is new; returns whether the run is still live."""
        # The status first: events that are written before a run's end are then never missed.
        status = self._reader.status()
        self._events = effective_events(self._events + self._reader.new_events())
        curve = Curve.of(self._events)
        self._header.value = _header(self.run, status, curve)
        self.bar.max, self.bar.value = status.max_steps or 1, status.global_step if status.max_steps else 0
        self.bar.bar_style = _BAR_STYLES.get(status.state, "info")
        self.stop_button.disabled = not status.live or status.state == "stopping"
        shown = (len(self._events), status.state, status.max_steps)
        if curve.steps and self._drawn != shown:
            self._drawn = shown
            picture = png(curve, status.max_steps, transparent=True)
            self._plot.value = image_tag(picture, curve.alt_text(status))
        self._saved.value = _saved_checkpoints(self.run, self._events)
        if not status.live:
            self._stop_note.value = ""
            self._end_note.value = _end_text(self.run, status)
            if not curve.steps:
                self._plot.value = ""
        return status.live

    def _stop(self, _: Any) -> None:
        self.stop_button.disabled = True
        try:
            self.run.stop(wait=False)
        except (OSError, RunError) as error:
            self._stop_note.value = note(error, "bad")
            return
        self._stop_note.value = note("Requested: a checkpoint is saved after this step, then the run ends.")


def _header(run: Run, status: RunStatus, curve: Curve) -> str:
    state = element("b", status.state, _STATE_KINDS.get(status.state, ""))
    if status.phase and status.phase != status.state:
        progress = f": {status.progress}" if status.progress else ""
        state += f" ({element('span', status.phase + progress)})"
    parts = [f"{element('code', run.output_dir.name)}: {state}"]
    if status.global_step or status.max_steps:
        of_steps = f" of {status.max_steps}" if status.max_steps else ""
        parts.append(element("span", f"step {status.global_step}{of_steps}"))
    if status.state == "starting":
        parts.append(element("span", "the first loss takes seconds to many minutes, depending on the model's size"))
    seconds = curve.seconds_left(status.max_steps)
    if status.live and seconds is not None:
        end = time.strftime("%H:%M", time.localtime(time.time() + seconds))
        parts.append(f"{element('b', f'{duration_text(seconds)} left')}, until about {end}")
    facts = (f"{element('span', name, 'faint')} {element('span', text)}" for name, text in curve.facts())
    reason = note(status.reason) if status.live and status.reason else ""
    return f'<div class="hynb">{" · ".join(parts)}{reason}<br>{" · ".join(facts)}</div>'


def _saved_checkpoints(run: Run, events: Sequence[dict[str, Any]]) -> str:
    """The complete checkpoints, with the time that each took to save."""
    seconds = {event.get("path"): event.get("seconds") for event in events if event["kind"] == "save"}
    items = []
    for path in run.checkpoints():
        took = seconds.get(path.name)
        items.append(element("code", path.name) + ("" if took is None else element("span", f" in {took} s")))
    if not items:
        return note("No checkpoint yet.", "faint")
    hidden = len(items) - _SHOWN_CHECKPOINTS
    more = f"{hidden} more, " if hidden > 0 else ""
    shown = ", ".join(items[-_SHOWN_CHECKPOINTS:])
    return f'<div class="hynb">Saved: {more}{shown} in {element("code", path_text(run.output_dir))}</div>'


def _end_text(run: Run, status: RunStatus) -> str:
    if status.state == "finished":
        return ""
    if status.state != "failed":
        return note(status.reason)
    log_folder = element("code", run.dir.log)
    return (
        f'<div class="hynb">{element("b", "The run failed.", "bad")}{block(status.reason)}'
        f"<details open><summary>The end of the log (the whole log is in {log_folder})</summary>"
        f"{block(run.reader.log_tail(_SHOWN_LOG_LINES), scrolls=True)}</details></div>"
    )
