"""A bar that fills while a process of its own works, with plain lines for the saved output."""

from __future__ import annotations

import time
from typing import Any

import ipywidgets as widgets

from hynb.widgets.table import STYLE, duration_text

# Plain lines beside the bar, for a notebook that runs without a page: one a tenth of the work.
_LINES = 10


class ProgressBar:
    """A bar on the page and a plain line now and then for the saved output."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._started = time.monotonic()
        self._printed = 0
        self.bar = widgets.FloatProgress(min=0.0, max=1.0, layout={"width": "100%", "max_width": "900px"})
        self._text = widgets.HTML()
        self.box = widgets.VBox([widgets.HTML(STYLE), self.bar, self._text])

    def show(self, done: float, total: float, text: str) -> None:
        """Moves the bar; done and total in the same unit."""
        share = done / total if total else 1.0
        self.bar.value = share
        seconds = time.monotonic() - self._started
        left = f", {duration_text(seconds / share - seconds)} left" if 0.02 < share < 1 else ""
        self._text.value = f'<div class="hynb">{self._what}: {share:.0%}, {text}{left}</div>'
        if int(share * _LINES) > self._printed or (share >= 1 and self._printed < _LINES):
            self._printed = int(share * _LINES)
            print(f"{self._what}: {share:.0%}, {text}", flush=True)

    def report(self, progress: dict[str, Any]) -> None:
        """Takes a worker's report of done, total and text."""
        self.show(progress["done"], progress["total"], progress["text"])

    def end(self, good: bool, text: str) -> None:
        """The last word, in green or red."""
        self.bar.bar_style = "success" if good else "danger"
        self.bar.value = 1.0 if good else self.bar.value
        self._text.value = f'<div class="hynb">{text}</div>'
