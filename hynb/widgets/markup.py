"""HTML for notebooks: one style sheet, and elements whose text is always escaped."""

from __future__ import annotations

import html
from typing import Literal

Kind = Literal["", "faint", "good", "bad"]

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


class Shown:
    """What a cell shows: HTML in a notebook, plain text in a saved or headless one.

    Args:
        text: the plain text.
        markup: the HTML, in which every text from outside is already escaped.
    """

    def __init__(self, text: str, markup: str) -> None:
        self.text = text
        self._markup = markup

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return f'{STYLE}<div class="hynb">{self._markup}</div>'


def element(name: str, text: object, kind: str = "") -> str:
    """An HTML element with escaped text.

    Args:
        name: of the element, such as `code`.
        kind: its class; none when empty.
    """
    opening = f'<{name} class="{kind}">' if kind else f"<{name}>"
    return f"{opening}{html.escape(str(text))}</{name}>"


def note(text: object, kind: Kind = "") -> str:
    """One line of text on its own, escaped."""
    return element("div", text, f"hynb {kind}".strip())


def block(text: str, *, scrolls: bool = False) -> str:
    """Preformatted text, escaped, to be put inside an element of class `hynb`.

    Args:
        scrolls: keep a long text in a box of limited height, as for a log.
    """
    return element("pre", text, "hynb-pre hynb-log" if scrolls else "hynb-pre")
