"""A model's output as a thought and an answer, whole or while it is written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Templates spell these tokens differently, such as <think> (Hunyuan-A13B, 7B) and <think:opensource> (Hy3).
_OPEN = re.compile(r"<think[^<>]*>")
_CLOSE = re.compile(r"</think[^<>]*>")
_ANSWER_OPEN = re.compile(r"\s*<answer[^<>]*>")
_ANSWER_CLOSE = re.compile(r"</answer[^<>]*>\s*\Z")
_ANSWER_TAG = re.compile(r"</?answer[^<>]*>")
_OPEN_AT_END = re.compile(r"<think[^<>]*>\s*\Z")
# A tag that is not complete yet is shorter than this.
_LONGEST_TAG = 64
# As hynb.data.template has them, which imports transformers.
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
Part = Literal["thought", "answer"]


@dataclass(kw_only=True, frozen=True)
class Answer:
    """What a model wrote for one question.

    Args:
        text: the answer without its thought and without `<answer…>` tags around it.
        thought: what stands between `<think…>` and `</think…>`; empty if there is none.
        ended: the model wrote an end token, and was not cut at the longest length.
        raw: the whole output, tags included, end token excluded.
    """

    text: str
    thought: str
    ended: bool
    raw: str


def make_answer(raw: str, *, ended: bool, opened: bool = False) -> Answer:
    """An output in parts.

    Args:
        opened: the prompt already opened the thought, as Hy3's does.
    """
    thought, text = split_thought(raw, opened=opened)
    return Answer(text=text, thought=thought, ended=ended, raw=raw)


def split_thought(text: str, *, opened: bool = False) -> tuple[str, str]:
    """The thought and the answer of an output; a thought that never ends has no answer.

    Args:
        opened: the text begins inside of a thought.
    """
    thoughts = []
    # Hy3's template puts an empty thought before an answer that spells one by itself.
    while opened or _OPEN.match(text.lstrip()):
        rest = text if opened else _OPEN.sub("", text, count=1)
        opened = False
        close = _CLOSE.search(rest)
        thought, text = (rest[: close.start()], rest[close.end() :]) if close else (rest, "")
        thoughts.append(thought.strip())
    if tag := _ANSWER_OPEN.match(text):
        text = _ANSWER_CLOSE.sub("", text[tag.end() :])
    return "\n".join(filter(None, thoughts)), text.strip()


def opens_thought(prompt: str) -> bool:
    """Whether a prompt ends inside of a thought."""
    return _OPEN_AT_END.search(prompt) is not None


class AnswerStream:
    """Divides an output into thought and answer while it is written.

    Args:
        opened: the output begins inside of a thought.
        special: pattern of special tokens, which are left out, as `<answer…>` tags are.
    """

    def __init__(self, special: re.Pattern[str], *, opened: bool = False) -> None:
        self._special = special
        self._part: Part = "thought" if opened else "answer"
        self._held = ""

    def feed(self, text: str, *, last: bool = False) -> Iterator[tuple[Part, str]]:
        """The parts of the output that are complete with this text.

        Args:
            last: no text follows, so that nothing is held back.
        """
        self._held += text
        ready = self._held
        tag = ready.rfind("<")
        if not last and tag >= 0 and ">" not in ready[tag:] and len(ready) - tag < _LONGEST_TAG:
            ready = ready[:tag]
        self._held = self._held[len(ready) :]
        while ready:
            match = (_CLOSE if self._part == "thought" else _OPEN).search(ready)
            before = self._special.sub("", ready[: match.start()] if match else ready)
            if self._part == "answer":
                before = _ANSWER_TAG.sub("", before)
            if before:
                yield self._part, before
            if match is None:
                break
            ready = ready[match.end() :]
            self._part = "answer" if self._part == "thought" else "thought"


def shown_answer(answer: Answer) -> str:
    """An answer with its thought apart, for a table."""
    return _shown(answer.thought, answer.text)


def shown_message(message: Mapping[str, Any]) -> str:
    """A message of the assistant in the data as `shown_answer` shows one, with its tool calls as JSON."""
    thought, text = split_thought(message.get("content") or "")
    given = next((message[name] for name in THOUGHT_FIELDS if message.get(name)), thought)
    calls = [json.dumps(call.get("function"), ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return _shown(str(given), "\n".join(filter(None, [text, *calls])))


def _shown(thought: str, text: str) -> str:
    return f"thought: {thought}\nanswer: {text or '(none)'}" if thought else text
