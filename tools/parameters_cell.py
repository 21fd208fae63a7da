"""Rewrites the parameters cell of the fine-tuning notebook from the schema: python tools/parameters_cell.py."""

from __future__ import annotations

from pathlib import Path

import nbformat

from hynb.widgets import parameters_cell

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "02_finetune.ipynb"

if __name__ == "__main__":
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source = parameters_cell()
    nbformat.write(notebook, NOTEBOOK)
