"""Finds what a chat template writes for each message by comparing renderings, where no loop over messages shows it.

Some templates collect their text in a variable that they print in the end, or copy the messages into other ones. What
they write for a message then is what is added to the text when the message is added to those before it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from hynb.data.message_forms import Messages
from hynb.errors import DataError

# Each message costs a rendering of all before it.
_MOST_MESSAGES = 500
Render = Callable[[Messages], str]
Spans = tuple[tuple[int, int] | None, ...]


class UntraceableError(Exception):
    """What a template writes for a message cannot be found; the text says why."""


def compared_spans(text: str, messages: Messages, render: Render, special: re.Pattern[str]) -> Spans:
    """Start and end of what a template writes for each message; None where that belongs to what follows.

    Args:
        text: the rendering of all messages.
        render: renders some of them, from the first on; raises DataError where the template refuses that.
        special: pattern of the special tokens' texts.

    Raises:
        UntraceableError: an answer's part cannot be found.
    """
    count = len(messages)
    if count > _MOST_MESSAGES:
        raise UntraceableError(
            "the chat template writes messages outside of a loop over them, where what belongs to each is found for "
            f"at most {_MOST_MESSAGES} messages, and these are {count}: divide the conversation"
        )
    bounds: list[int | None] = [0]
    for number in range(1, count):
        start = next(bound for bound in reversed(bounds) if bound is not None)
        bounds.append(_bound(text, messages[:number], start, render, special))
    bounds.append(len(text))
    for number in range(count - 2, 0, -1):
        if bounds[number] is None:
            bounds[number] = _bound_before_user(text, messages[: number + 1], bounds[number + 1], render)
    return tuple(_spans(text, messages, bounds))


def _spans(text: str, messages: Messages, bounds: list[int | None]) -> list[tuple[int, int] | None]:
    spans: list[tuple[int, int] | None] = []
    start = 0
    for number, message in enumerate(messages):
        first, end = bounds[number], bounds[number + 1]
        if message["role"] == "assistant" and (first is None or end is None or end < start):
            raise UntraceableError(
                f"the chat template writes message {number + 1} outside of a loop over the messages, and in another "
                "way where other messages follow it, so that the part to train on cannot be found: set split_turns: "
                "true, or loop over the messages in the template"
            )
        if end is None or end < start:
            spans.append(None)
            continue
        content = message.get("content")
        if start == end and isinstance(content, str) and content.strip() and content.strip() in text:
            if message["role"] == "tool":
                raise UntraceableError(
                    f"the chat template has no place of its own for the tool's result, message {number + 1}: use a "
                    "model whose template renders tools, or remove the record"
                )
            raise UntraceableError(
                f"the chat template writes message {number + 1} together with a later one, so that the part to "
                "train on cannot be found: write each message in its own place in the template"
            )
        spans.append((start, end))
        start = end
    return spans


def _bound(text: str, messages: Messages, start: int, render: Render, special: re.Pattern[str]) -> int | None:
    """Where the text of these first messages ends in the text of all; None if that cannot be seen.

    Args:
        start: the last position that is known.
    """
    try:
        alone = render(messages)
    except DataError:
        return None
    if text.startswith(alone):
        return len(alone)
    # The template may write something behind all messages, which may begin like what it writes for the next one.
    end = len(os.path.commonprefix([text, alone]))  # noqa: RUF071  works on text, not only on paths
    for whole in (text, alone):
        end = next((match.start() for match in special.finditer(whole) if match.start() < end < match.end()), end)
    content = messages[-1].get("content")
    is_whole = isinstance(content, str) and bool(content.strip()) and content.strip() in text[start:end]
    return end if is_whole or not special.sub("", alone[end:]).strip() else None


def _bound_before_user(text: str, messages: Messages, end: int | None, render: Render) -> int | None:
    """Where a user's message begins, found by what it adds to another answer than the one before it.

    The template may shorten that answer once a message follows it.

    Args:
        messages: up to and with the user's.
        end: where the user's message ends.
    """
    if end is None or messages[-1]["role"] != "user" or messages[-2]["role"] != "assistant":
        return None
    before = [*messages[:-2], {"role": "assistant", "content": "…"}]
    try:
        without, whole = render(before), render([*before, messages[-1]])
    except DataError:
        return None
    added = whole[len(without) :]
    is_added = bool(added) and whole.startswith(without) and text[:end].endswith(added)
    return end - len(added) if is_added else None
