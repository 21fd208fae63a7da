"""A progress bar for work in another process, with plain lines for the saved output."""

from __future__ import annotations

import time

import ipywidgets as widgets

from hynb.runs import duration_text
from hynb.widgets.markup import STYLE, note
from hynb.widgets.tasks import Progress

# A headless notebook shows no bar, so that one plain line per tenth of the work is printed too.
_LINES = 10
# Below this share of the work an estimate of the remaining time means nothing.
_LEAST_SHARE = 0.02


class ProgressBar:
    """A bar in the notebook, and a plain line now and then for the saved output.

    Args:
        name: of the work, such as "merging".
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = time.monotonic()
        self._printed_tenths = 0
        self.bar = widgets.FloatProgress(min=0.0, max=1.0, layout={"width": "100%", "max_width": "900px"})
        self._text = widgets.HTML()
        self.box = widgets.VBox([widgets.HTML(STYLE), self.bar, self._text])

    def show(self, progress: Progress) -> None:
        """Moves the bar."""
        share = progress.done / progress.total if progress.total else 1.0
        self.bar.value = share
        line = f"{self._name}: {share:.0%}, {progress.text}"
        seconds = time.monotonic() - self._started
        has_estimate = _LEAST_SHARE < share < 1
        self._text.value = note(line + (f", {duration_text(seconds / share - seconds)} left" if has_estimate else ""))
        tenths = int(share * _LINES)
        if tenths > self._printed_tenths:
            self._printed_tenths = tenths
            print(line, flush=True)

    def end(self, good: bool, text: str) -> None:
        """Shows the result, with the bar in green or red."""
        self.bar.bar_style = "success" if good else "danger"
        self.bar.value = 1.0 if good else self.bar.value
        self._text.value = note(text)
