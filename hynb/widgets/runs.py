"""Finds run folders and lets a person choose one, to watch it again or to merge what it trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ipywidgets as widgets

from hynb.launch import attach
from hynb.runs import RunReader
from hynb.widgets.form import acknowledge_edit
from hynb.widgets.session import watch
from hynb.widgets.table import STYLE, Table

_NO_RUN = "(none)"


def find_runs(folder: str | Path) -> list[Path]:
    """Run folders in a folder and one level below, the newest first."""
    top = Path(folder).expanduser().absolute()
    found = {path.parent for pattern in ("run.yaml", "*/run.yaml", "*/*/run.yaml") for path in top.glob(pattern)}
    return sorted(found, key=lambda path: (path / "run.yaml").stat().st_mtime, reverse=True)


def runs_table(folder: str | Path) -> Table:
    """Every run in a folder with its state."""
    rows = [(str(path), str(RunReader(path).status())) for path in find_runs(folder)]
    return Table(columns=("run folder", "state"), rows=rows, title=f"Runs in {Path(folder).absolute()}")


class RunChooser(widgets.VBox):
    """A list of the runs in a folder; `Show` brings a run's live panel back, whoever started it."""

    def __init__(self, folder: str | Path = "runs") -> None:
        self._folder = folder
        self.runs = widgets.Dropdown(description="run", options=[_NO_RUN], layout={"width": "560px"})
        self.show_button = widgets.Button(description="Show", tooltip="Show the live panel of this run")
        self.refresh_button = widgets.Button(description="Look again", tooltip="Read the folder again")
        self._table = widgets.HTML()
        self._place = widgets.VBox()
        self.show_button.on_click(self._show)
        self.refresh_button.on_click(self._refresh)
        self.runs.observe(lambda _: acknowledge_edit(), names="value")
        row = widgets.HBox([self.runs, self.show_button, self.refresh_button])
        super().__init__([widgets.HTML(STYLE), self._table, row, self._place])
        self._refresh()

    def _refresh(self, _: Any = None) -> None:
        found = find_runs(self._folder)
        self.runs.options = [(path.name, str(path)) for path in found] or [_NO_RUN]
        self.show_button.disabled = not found
        self._table.value = f'<div class="hynb">{runs_table(self._folder).html()}</div>'

    def _show(self, _: Any) -> None:
        self._place.children = (watch(attach(self.runs.value)),)
