"""A message's content in the text that a chat template writes: whether it is there, and what has become of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from hynb.data.placeholders import BREAK

THOUGHT = re.compile(r"<think[^<>]*>")
_WHOLE_THOUGHT = re.compile(r"<think[^<>]*>.*?(</think[^<>]*>|$)", re.DOTALL)
# What a text has up to the end of its last thought, also where its prompt has begun the thought.
_UP_TO_ANSWER = re.compile(r".*</think[^<>]*>", re.DOTALL)
_TAG_WITH_SPACE = re.compile(r"\s*(</?think[^<>]*>)\s*")
SPACE_NOTE = "answers in which white space beside <think> tags is the template's"
TEXT_NOTE = (
    "answers with <think> in their content, which stays text behind the template's own thought: reasoning_content "
    "would be the thought"
)
# A beginning that is shorter is found in most texts.
_MIN_FOUND = 3
_SHOWN = 20


def has_content(text: str, content: str) -> bool:
    """Whether a content is in a text, as it is or as a JSON string."""
    content = content.strip()
    return content in text or any(
        json.dumps(content, ensure_ascii=ascii_only)[1:-1] in text for ascii_only in (False, True)
    )


def has_respaced(text: str, content: str) -> bool:
    """Whether a content with a thought is in a text but for white space beside the tags of thoughts."""
    given = _TAG_WITH_SPACE.sub(r"\1", content.strip())
    return _TAG_WITH_SPACE.search(content) is not None and given in _TAG_WITH_SPACE.sub(r"\1", text)


def has_answer(text: str, content: str) -> bool:
    """Whether an answer is in a text, as it is or but for white space beside the tags of thoughts."""
    return has_content(text, content) or has_respaced(text, content)


def notes_on(content: str, text: str) -> list[str]:
    """What a user may not expect of how an answer with a thought is written.

    Args:
        content: of the answer.
        text: what is trained on of it.
    """
    opened = THOUGHT.search(content)
    if has_respaced(text, content) and not has_content(text, content):
        return [SPACE_NOTE]
    if opened and (position := text.find(content.strip())) > 0 and THOUGHT.search(text[:position]):
        return [TEXT_NOTE]
    return []


def is_without_thought(text: str, content: str, *, has_calls: bool = False) -> bool:
    """Whether a text is all of an answer but its thought and its tags.

    Args:
        has_calls: tool calls stand beside the content in the text.
    """
    given, answer = (
        "".join(re.sub(r"<[^<>]*>", "", part).split()) for part in (text, _WHOLE_THOUGHT.sub("", content))
    )
    return answer in given if has_calls else answer == given


def change_of(message: Mapping[str, Any], text: str) -> str:
    """What a template has done to a content that is not in its text, and what to do.

    Args:
        text: what the template wrote of the message.
    """
    content = message["content"].strip()
    kept = _found_beginning(content, text)
    rest = _UP_TO_ANSWER.sub("", content).strip()
    if message["role"] == "assistant" and rest != content and rest and rest in text:
        thought = "between <think> and" if THOUGHT.search(content) else "up to"
        return (
            f"it removes the part {thought} </think>: move the thought to reasoning_content if the template "
            "renders that, or remove it"
        )
    if message.get("tool_calls") and kept < _MIN_FOUND:
        return "it does not write the content beside the tool calls: remove the content, or the tool calls"
    if kept < min(_MIN_FOUND, len(content)):
        return "it leaves its content out or rewrites it: use a model whose template does not, or remove the record"
    position = text.find(content[:kept]) + kept
    given, written = (_excerpt(part) for part in (content[kept:], text[position:]))
    return (
        f"from character {kept + 1} of its content on, it writes {written} instead of {given}: write the content as "
        "the template does"
    )


def _found_beginning(content: str, text: str) -> int:
    """Length of the longest beginning of a content that is in a text."""
    low, high = 0, len(content)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if content[:middle] in text else (low, middle - 1)
    return low


def _excerpt(text: str) -> str:
    text = text.replace(BREAK, "")
    return repr(text[:_SHOWN] + "…" if len(text) > _SHOWN else text)
