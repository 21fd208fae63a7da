"""The answers of models, shown while they are written: each with its question, its thought and its answer apart."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets

from hynb.widgets.markup import STYLE, block, element, note
from hynb.widgets.tasks import Piece

# Each update sends the whole text of the answer to the page.
_UPDATE_SECONDS = 0.1


class AnswerView(widgets.VBox):
    """A box with one card per answer, which follows the answer that is being written.

    In a saved output without widgets it is plain text: the answers that are complete.

    Args:
        models: names of the models, in the order of their numbers.
    """

    def __init__(self, models: Sequence[str]) -> None:
        self._models = models
        self._texts: list[str] = []
        self._parts: dict[str, str] = {}
        self._heading = ""
        self._card = widgets.HTML()
        self._updated = 0.0
        # The newest card comes first in a reversed box, which thus stays scrolled to its bottom.
        self._cards = widgets.Box(layout={"flex_flow": "column-reverse", "max_height": "420px", "overflow": "auto"})
        super().__init__([widgets.HTML(STYLE), self._cards])

    @property
    def text(self) -> str:
        """The complete answers as plain text."""
        return "\n\n".join(self._texts)

    def show(self, piece: Piece) -> None:
        """Adds a piece of an answer."""
        if piece.part == "question":
            self.flush()
            self._heading, self._parts = f"{self._models[piece.model]}, question {piece.question + 1}", {}
            self._card = widgets.HTML()
            self._cards.children = (self._card, *self._cards.children)
        self._parts[piece.part] = self._parts.get(piece.part, "") + piece.text
        if piece.part == "end":
            self._texts.append(self._plain())
        if piece.part in ("question", "end") or time.monotonic() - self._updated > _UPDATE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Shows what came since the last update."""
        self._updated = time.monotonic()
        if not self._parts:
            return
        parts = self._stripped()
        markup = element("b", self._heading) + block(parts["question"])
        if parts["thought"]:
            markup += element("div", "thought", "faint") + f'<div class="faint">{block(parts["thought"])}</div>'
        if parts["answer"]:
            markup += element("div", "answer", "faint") + block(parts["answer"])
        end = parts["end"] or ("" if "end" in self._parts else "…")
        self._card.value = f'<div class="hynb hynb-answer">{markup}{note(end, "faint")}</div>'

    def _stripped(self) -> dict[str, str]:
        return {name: self._parts.get(name, "").strip() for name in ("question", "thought", "answer", "end")}

    def _plain(self) -> str:
        parts = self._stripped()
        lines = [f"{self._heading}: {parts['question']}"]
        lines += [f"thought: {parts['thought']}"] if parts["thought"] else []
        lines.append(f"answer: {parts['answer'] or '(none)'}")
        return "\n".join(lines) + (f" [{parts['end']}]" if parts["end"] else "")

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return {**(super()._repr_mimebundle_(**kwargs) or {}), "text/plain": self.text}
