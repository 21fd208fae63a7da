"""What a chat template writes around contents: the rendering of placeholders, which contents then replace."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hynb.data.message_forms import Messages
from hynb.errors import DataError

# Noncharacters, as in jinja_trace: inside of a special token's text, it stays text; around a probed content.
BREAK = "\ufdd2"
# A capital and a small letter, of a script that no template looks for, show whether it changes between the two.
_LETTERS = "\U00010400\U00010428"
_PLACEHOLDER = f"\ufdd3{{}}{_LETTERS}\ufdd4"
_PLACEHOLDERS = re.compile(f"(\u2003?)\ufdd3(\\d+){_LETTERS}\ufdd4(\u2003?)")
# White space (an em space) that no template writes itself: where it is missing, the template strips contents.
_PADDING = "\u2003"
# Of each message: its role, and whether its content is empty.
Shape = tuple[tuple[str, bool], ...]


@dataclass(kw_only=True, frozen=True)
class Rendered:
    """A conversation as the template renders it for training.

    Args:
        text: special tokens that messages spell have a `BREAK` inside, unless they are to become tokens.
        trained: start and end of each part that is trained on, in order and apart.
        turns: for each message, start and end of what the template wrote for it; None where it wrote nothing.
        problems: for numbers of earlier answers, from 0, that have no end token or are cut: why not to train on them.
    """

    text: str
    trained: tuple[tuple[int, int], ...]
    turns: tuple[tuple[int, int] | None, ...]
    problems: Mapping[int, str] = field(default_factory=dict)


@dataclass(kw_only=True, frozen=True)
class Slot:
    """The place of a content in a rendering.

    Args:
        number: index of the message.
        strips_left, strips_right: whether the template removes white space at that end of the content.
    """

    number: int
    strips_left: bool
    strips_right: bool

    def text(self, messages: Messages) -> str:
        """What the template writes of the message's content."""
        content: str = messages[self.number]["content"]
        content = content.lstrip() if self.strips_left else content
        return content.rstrip() if self.strips_right else content


def shape_of(messages: Messages) -> Shape:
    """The shape of messages with a role and a text each."""
    return tuple((message["role"], message["content"] == "") for message in messages)


def placeholder_messages(shape: Shape) -> list[dict[str, Any]]:
    """Messages of a shape with placeholders as their contents."""
    return [
        {"role": role, "content": "" if empty else _PADDING + _PLACEHOLDER.format(number) + _PADDING}
        for number, (role, empty) in enumerate(shape)
    ]


def placeholder_positions(text: str) -> dict[int, int]:
    """Where the placeholder of each message's content begins in a rendering, by the message's index."""
    return {int(match[2]): match.start() for match in _PLACEHOLDERS.finditer(text)}


def placeholder(number: int) -> str:
    """The placeholder of the content of a message."""
    return _PLACEHOLDER.format(number)


def without_placeholders(text: str) -> str:
    """A message with an ellipsis in place of each placeholder."""
    return _PLACEHOLDERS.sub("…", text)


def parts(text: str) -> Iterator[str | Slot]:
    """A rendering of placeholders in parts: what the template writes, and the places of contents."""
    position = 0
    for match in _PLACEHOLDERS.finditer(text):
        if match.start() > position:
            yield text[position : match.start()]
        yield Slot(number=int(match[2]), strips_left=not match[1], strips_right=not match[3])
        position = match.end()
    if position < len(text):
        yield text[position:]


class Placeholders:
    """A rendering of placeholders, to be filled with the contents of any conversation of the same shape.

    Attributes:
        rendered: the rendering.

    Raises:
        DataError: the template leaves out or changes a content.
    """

    def __init__(self, rendered: Rendered, shape: Shape, source: str) -> None:
        self.rendered = rendered
        self._parts = list(parts(rendered.text))
        # Positions in the rendering that have to be moved as contents are filled in.
        self._cuts = [(match.start(), match.end()) for match in _PLACEHOLDERS.finditer(rendered.text)]
        found = [part.number for part in self._parts if isinstance(part, Slot)]
        for number in (number for number, (_, empty) in enumerate(shape) if not empty):
            if (times := found.count(number)) != 1:
                what = "repeats" if times else "leaves out or changes"
                raise DataError(f"{source}: the chat template {what} message {number + 1}")

    def fill(self, messages: Messages) -> Rendered:
        """The rendering of messages."""
        texts: list[str] = []
        ends: list[int] = []
        shifts: list[int] = [0]
        shift, cuts = 0, iter(self._cuts)
        for part in self._parts:
            if isinstance(part, str):
                texts.append(part)
                continue
            content = part.text(messages)
            texts.append(content)
            start, end = next(cuts)
            shift += len(content) - (end - start)
            ends.append(end)
            shifts.append(shift)

        def moved(position: int) -> int:
            return position + shifts[bisect.bisect_right(ends, position)]

        def moved_span(span: tuple[int, int]) -> tuple[int, int]:
            return moved(span[0]), moved(span[1])

        return Rendered(
            text="".join(texts),
            trained=tuple(map(moved_span, self.rendered.trained)),
            turns=tuple(moved_span(span) if span else None for span in self.rendered.turns),
            problems=self.rendered.problems,
        )
