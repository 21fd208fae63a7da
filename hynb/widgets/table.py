"""A small table that a notebook shows as HTML and a saved or headless one as plain text."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# The notebook's own colours, so that both themes are readable; the fallbacks are for a saved page.
STYLE = """<style>
.hynb { color: var(--jp-ui-font-color1, inherit); font-size: 13px; line-height: 1.45; }
.hynb code, .hynb pre { font-family: var(--jp-code-font-family, monospace); font-size: 12px; }
.hynb.faint, .hynb .faint { color: var(--jp-ui-font-color2, #666); }
.hynb.bad, .hynb .bad { color: var(--jp-error-color1, #c62828); }
.hynb.good, .hynb .good { color: var(--jp-success-color1, #2e7d32); }
.hynb table.hynb-table { border-collapse: collapse; margin: 4px 0 8px 0; font-size: 13px; }
.hynb table.hynb-table th, .hynb table.hynb-table td { text-align: left; vertical-align: top;
  white-space: normal; padding: 3px 14px 3px 6px; border-bottom: 1px solid var(--jp-border-color2, #ccc); }
.hynb table.hynb-table th { font-weight: 600; }
.hynb table.hynb-table caption { text-align: left; font-weight: 600; padding: 4px 6px; caption-side: top; }
.hynb table.hynb-table tr.chosen td { background: var(--jp-layout-color2, #eee); font-weight: 600; }
.hynb pre.hynb-pre { white-space: pre-wrap; margin: 4px 0 10px 0; padding: 8px; line-height: 1.4;
  background: var(--jp-layout-color2, #f3f3f3); color: var(--jp-ui-font-color1, inherit); }
.hynb pre.hynb-log { max-height: 300px; overflow: auto; }
.hynb .hynb-wait { max-width: 900px; aspect-ratio: 9 / 4.6; display: flex; align-items: center;
  justify-content: center; border: 1px dashed var(--jp-border-color2, #ccc); }
.hynb .hynb-sample { margin: 4px 0 14px 0; max-height: 420px; overflow: auto; }
.jupyter-widgets.hynb-form > .lm-TabBar .lm-TabBar-tab { flex: 0 1 auto !important; max-width: none; }
</style>"""


@dataclass(kw_only=True, frozen=True, repr=False)
class Table:
    """Rows of text under a heading.

    Args:
        columns: the heads of the columns.
        rows: one text a column each; a line break inside a text stays one.
        title: what the table shows.
        chosen: index of the row that stands out; None for none.
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
        """The table alone, to be set inside an element of class `hynb`."""
        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        head = "".join(f'<th scope="col">{html.escape(str(name))}</th>' for name in self.columns)
        body = ""
        for index, row in enumerate(self.rows):
            cells = "".join(f"<td>{html.escape(str(cell)).replace(chr(10), '<br>')}</td>" for cell in row)
            body += f'<tr class="chosen">{cells}</tr>' if index == self.chosen else f"<tr>{cells}</tr>"
        return f'<table class="hynb-table">{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'

    def _repr_html_(self) -> str:
        return f'{STYLE}<div class="hynb">{self.html()}</div>'


def block(text: str, *, scrolls: bool = False) -> str:
    """Preformatted text as HTML, escaped.

    Args:
        scrolls: keep a long one in a box of its own, as a log is.
    """
    return f'<pre class="hynb-pre{" hynb-log" if scrolls else ""}">{html.escape(text)}</pre>'


def path_text(path: Path) -> str:
    """A path as a person at this folder writes it: relative where it lies below, else whole."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def size_text(size_bytes: float) -> str:
    """Bytes as a person reads them, in powers of ten: 12.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size_bytes) < 999.5:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB"


def duration_text(seconds: float) -> str:
    """Seconds as a person reads them: 45 s, 12 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours} h {rest // 60} min" if hours < 48 else f"{hours / 24:.1f} days"


def _width(text: str) -> int:
    """Columns that a text takes in a terminal, where a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
