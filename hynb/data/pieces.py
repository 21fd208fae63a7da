"""Parts of a rendered conversation that are tokenised one by one: special tokens and texts, trained on or not."""

from __future__ import annotations

import functools
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hynb.data.files import Conversation
from hynb.data.placeholders import BREAK, Rendered
from hynb.errors import DataError

IGNORED = -100
TrainOnTurns = Literal["as_rendered", "all", "last"]


@dataclass(kw_only=True, frozen=True)
class LabelOptions:
    """What is trained on, and how contents are tokenised.

    Args:
        train_on_prompt: all text of the template too, and not the answers alone.
        allow_special_tokens_in_text: text in a message that spells a special token becomes the token.
        train_on_turns: as_rendered: every answer as the template shows it, which may be without its thought. all:
            every answer in full; a record whose template shortens one is refused. last: the last answer alone.
        split_turns: one sample per answer, which ends with it, so that each is rendered in full.
        allow_ignored_fields: fields of a record that the template does not render are left out.
    """

    train_on_prompt: bool = False
    allow_special_tokens_in_text: bool = False
    train_on_turns: TrainOnTurns = "as_rendered"
    split_turns: bool = False
    allow_ignored_fields: bool = False


DEFAULT = LabelOptions()
# Token ids that are known beforehand, or None for those of the next text; and whether they are trained on.
Segment = tuple[array | None, bool]


@dataclass(kw_only=True, frozen=True, slots=True)
class Prepared:
    """A conversation that is ready to be tokenised.

    Args:
        segments: its token ids in order, so far as they are known.
        texts: those that are still to be tokenised, one for each segment without ids.
        ignored: fields that the template does not render, where `allow_ignored_fields` is on, and arguments that
            change the prompt alone.
        unknown: the record's keys that nothing reads.
        shortened: number of answers that the template shortens.
        spelled: whether a message spells a special token.
        notes: what a user may not expect of how the template writes the conversation.
    """

    segments: list[Segment]
    texts: list[str]
    ignored: tuple[str, ...]
    unknown: tuple[str, ...]
    shortened: int
    spelled: bool
    special_tokens_allowed: bool
    notes: tuple[str, ...] = ()


@dataclass(kw_only=True, frozen=True)
class Piece:
    """A part of a rendered conversation.

    Args:
        special: its text is one special token.
        trained: it is trained on.
    """

    text: str
    special: bool
    trained: bool


def pieces(text: str, spans: list[tuple[int, int]], pattern: re.Pattern[str]) -> Iterator[Piece]:
    """A rendered text in pieces that are trained on within the spans, and not elsewhere."""
    position, length = 0, len(text)
    for start, end in [*spans, (length, length)]:
        yield from split(text[position:start], pattern, False)
        yield from split(text[start:end], pattern, True)
        position = end


def trained_spans(conversation: Conversation, rendered: Rendered, options: LabelOptions) -> list[tuple[int, int]]:
    """Start and end of each part of a rendering that the options choose to train on.

    Raises:
        DataError: one of these is an answer that the template ends with no end token, or cuts.
    """
    answers = [message for message in conversation.messages if message["role"] == "assistant"]
    last_only = options.train_on_turns == "last" or options.split_turns
    kept = [
        (span, bool(message.get("train", True)) and (not last_only or number + 1 == len(answers)))
        for number, (message, span) in enumerate(zip(answers, rendered.trained, strict=True))
    ]
    for number, problem in rendered.problems.items():
        if kept[number][1]:
            raise DataError(f"{conversation.source}: {problem}")
    if not options.train_on_prompt:
        return [span for span, is_kept in kept if is_kept]
    # Everything but the messages that are not trained on.
    left_out = [span for span, is_kept in kept if not is_kept]
    left_out += [
        span
        for message, span in zip(conversation.messages, rendered.turns, strict=True)
        if span and message["role"] != "assistant" and not message.get("train", True)
    ]
    spans, position = [], 0
    for start, end in sorted(left_out):
        spans.append((position, start))
        position = end
    return [span for span in [*spans, (position, len(rendered.text))] if span[0] < span[1]]


def split(text: str, pattern: re.Pattern[str], trained: bool) -> Iterator[Piece]:
    """A text in pieces: special tokens, and the texts between them."""
    position = 0
    for match in pattern.finditer(text):
        if match.start() > position:
            yield Piece(text=text[position : match.start()].replace(BREAK, ""), special=False, trained=trained)
        yield Piece(text=match[0], special=True, trained=trained)
        position = match.end()
    if position < len(text):
        yield Piece(text=text[position:].replace(BREAK, ""), special=False, trained=trained)


@functools.lru_cache(maxsize=8)
def _special_cache(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    return {}


def special_ids(tokenizer: PreTrainedTokenizerBase, token: str) -> list[int]:
    """Ids of the text of a special token."""
    known = _special_cache(tokenizer)
    if token not in known:
        known[token] = tokenizer.encode(token, add_special_tokens=False)
    return known[token]


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], allow_special_tokens: bool) -> Iterator[list[int]]:
    """Ids of each text; unless allowed, what spells a special token stays text."""
    if not texts:
        return iter(())
    split = not allow_special_tokens
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return (tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split) for text in texts)
    # transformers' own call also makes offsets and masks, which takes time and is not needed.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    before, backend.encode_special_tokens = backend.encode_special_tokens, split
    try:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    finally:
        backend.encode_special_tokens = before
    return (item.ids for item in encodings)
