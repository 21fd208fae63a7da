"""What widgets show, read back as text and as elements, and names that must not become elements."""

from __future__ import annotations

from html.parser import HTMLParser

import ipywidgets

from hynb.config import Config

# Runs a script in every page that shows it without escaping it; a valid file name too.
EVIL = "<img src=x onerror=alert(1)>"


def html_of(widget: ipywidgets.Widget) -> str:
    """The HTML of a widget and of all widgets in it."""
    own = widget.value if isinstance(widget, ipywidgets.HTML) else ""
    return own + "".join(html_of(child) for child in getattr(widget, "children", ()))


def text_of(html: str) -> str:
    """The text that a page with this HTML shows, without style sheets."""
    return _parsed(html).text


def assert_escaped(html: str) -> None:
    """Fails unless the HTML contains EVIL, and only as text."""
    parsed = _parsed(html)
    assert EVIL in parsed.text
    for tag, attributes in parsed.elements:
        assert not any(name.startswith("on") for name, _ in attributes), (tag, attributes)
        assert tag != "img" or dict(attributes).get("class") == "hynb-plot", (tag, attributes)
        assert tag != "script"


def make_config(**values) -> Config:
    """A Config with the two parameters that have no default."""
    return Config(**{"model_name_or_path": "/models/base", "train_data_file": "data.jsonl"} | values)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.text = ""
        self._in_style = False

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, attrs))
        self._in_style = tag == "style"

    def handle_endtag(self, tag):
        self._in_style = False

    def handle_data(self, data):
        if not self._in_style:
            self.text += data


def _parsed(html: str) -> _Page:
    page = _Page()
    page.feed(html)
    page.close()
    return page
