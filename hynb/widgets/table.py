"""Tables that a notebook shows as HTML and a saved or headless one as plain text, and the units in them."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hynb.widgets.markup import STYLE, element


@dataclass(kw_only=True, frozen=True, repr=False)
class Table:
    """Rows of text under a heading; every text is escaped in HTML.

    Args:
        columns: headings of the columns.
        rows: one text per column each; line breaks are kept in HTML.
        title: what the table shows.
        chosen: index of the highlighted row; None for none.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    chosen: int | None = None

    def __repr__(self) -> str:
        lines = [list(self.columns), *(list(row) for row in self.rows)]
        cells = [[str(cell).replace("\n", " ") for cell in row] for row in lines]
        widths = [max(_width(row[column]) for row in cells) for column in range(len(self.columns))]
        texts = [
            "  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True))
            for row in cells
        ]
        rule = "  ".join("-" * width for width in widths)
        marked = [f"{text.rstrip()}{'  <-' if index == self.chosen else ''}" for index, text in enumerate(texts[1:])]
        return "\n".join([*([self.title] if self.title else []), texts[0].rstrip(), rule, *marked])

    def html(self) -> str:
        """The table alone, to be put inside an element of class `hynb`."""
        caption = element("caption", self.title) if self.title else ""
        head = "".join(f'<th scope="col">{html.escape(str(name))}</th>' for name in self.columns)
        body = ""
        for index, row in enumerate(self.rows):
            cells = "".join(f"<td>{html.escape(str(cell)).replace(chr(10), '<br>')}</td>" for cell in row)
            body += f'<tr class="chosen">{cells}</tr>' if index == self.chosen else f"<tr>{cells}</tr>"
        return f'<table class="hynb-table">{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'

    def _repr_html_(self) -> str:
        return f'{STYLE}<div class="hynb">{self.html()}</div>'


def path_text(path: Path) -> str:
    """A path relative to the working directory if it is below it, else the whole path."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _width(text: str) -> int:
    """The number of terminal columns of a text, in which a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
