"""Finds run folders and lets a person choose one, to watch it again or to merge what it trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ipywidgets as widgets

from hynb.errors import RunError
from hynb.launch import attach
from hynb.runs import RunReader
from hynb.widgets.kernel import acknowledge_edit
from hynb.widgets.markup import STYLE, note
from hynb.widgets.session import watch
from hynb.widgets.table import Table

# The only entry of an empty list.
NOTHING = "(none)"


def find_runs(folder: str | Path) -> list[Path]:
    """The run folders in a folder and up to two levels below it, newest first."""
    top = Path(folder).expanduser().absolute()
    found = {path.parent for pattern in ("run.yaml", "*/run.yaml", "*/*/run.yaml") for path in top.glob(pattern)}
    return sorted(found, key=lambda path: (path / "run.yaml").stat().st_mtime, reverse=True)


def runs_table(folder: str | Path) -> Table:
    """Every run in a folder, with its state."""
    rows = [(str(path), _state_text(path)) for path in find_runs(folder)]
    return Table(columns=("run folder", "state"), rows=rows, title=f"Runs in {Path(folder).absolute()}")


def _state_text(path: Path) -> str:
    try:
        return str(RunReader(path).status())
    except RunError as error:
        return f"unknown: {error}"


class RunChooser(widgets.VBox):
    """A list of the runs in a folder; its button shows the live panel of a run, whoever started it.

    Args:
        folder: where run folders are looked for.
    """

    def __init__(self, folder: str | Path = "runs") -> None:
        self._folder = folder
        self.runs = widgets.Dropdown(description="run", options=[NOTHING], layout={"width": "560px"})
        self.show_button = widgets.Button(description="Show", tooltip="Show the live panel of this run")
        self.refresh_button = widgets.Button(description="Refresh", tooltip="Look for runs again")
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
        self.runs.options = [(path.name, str(path)) for path in found] or [NOTHING]
        self.show_button.disabled = not found
        self._table.value = f'<div class="hynb">{runs_table(self._folder).html()}</div>'

    def _show(self, _: Any) -> None:
        try:
            self._place.children = (watch(attach(str(self.runs.value))),)
        except RunError as error:
            self._place.children = (widgets.HTML(note(error, "bad")),)
