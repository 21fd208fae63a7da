"""Token ids and labels of a conversation, found from the chat template itself: answers alone are trained on."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hynb.data.files import Conversation
from hynb.errors import DataError

IGNORED = -100
# Stands for message number N while the template is looked at: private-use characters that no text holds.
_MARK = "\ue000{}\ue001"
# White space that no template writes itself: where it is gone, the template strips contents.
_PAD = "\u2003"
# Answers among the first so many messages are also looked at as the conversation's last; a later one is closed as
# the last is. The time taken grows with the square of it.
_LOOKED_AT_MESSAGES = 32


@dataclass(kw_only=True, frozen=True)
class Template:
    """What a chat template writes around the messages of a conversation.

    opening: the text before each message's content, without what closes the answer before it.
    closing: the text that ends each answer, to be learnt with it; of other messages, what stands after the last.
    strips: for each message, whether white space is cut off its left and its right end.
    """

    opening: tuple[str, ...]
    closing: tuple[str, ...]
    strips: tuple[tuple[bool, bool], ...]


@dataclass(kw_only=True, frozen=True)
class Piece:
    """A stretch of a conversation's text: written by the template or a message's content; trained on or not."""

    text: str
    content: bool
    trained: bool


@dataclass(kw_only=True, frozen=True)
class LabelOptions:
    """What is trained on, and how contents are read.

    train_on_prompt: system's and user's messages too, template's marks included.
    allow_special_tokens_in_text: letters of a special token in a content become the token, as in the original.
    """

    train_on_prompt: bool = False
    allow_special_tokens_in_text: bool = False


DEFAULT = LabelOptions()


def encode(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    options: LabelOptions = DEFAULT,
) -> dict[str, list[int]]:
    """Token ids and labels of a conversation, cut at `max_seq_length` tokens.

    Labels are the ids of the assistant's answers, each with what the template ends it with, and -100 elsewhere:
    never the prompt, never the marker that opens the answer, no message with `"train": false`. The letters of a
    special token inside a message stay letters.

    Raises:
        DataError: the chat template changes a message's text or refuses the conversation.
    """
    return encode_many([conversation], tokenizer, max_seq_length, options)[0]


def encode_many(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    options: LabelOptions = DEFAULT,
) -> list[dict[str, list[int]]]:
    """`encode` of many conversations, tokenised together, which takes about half the time."""
    pieces = [conversation_pieces(item, tokenizer, options.train_on_prompt) for item in conversations]
    letters = not options.allow_special_tokens_in_text
    texts = [piece.text for of_one in pieces for piece in of_one if piece.content]
    contents = iter(_content_ids(tokenizer, texts, letters))
    encoded = []
    for of_one in pieces:
        input_ids: list[int] = []
        labels: list[int] = []
        for piece in of_one:
            ids = next(contents) if piece.content else _template_ids(tokenizer, piece.text)
            input_ids.extend(ids)
            labels.extend(ids if piece.trained else [IGNORED] * len(ids))
        encoded.append({"input_ids": input_ids[:max_seq_length], "labels": labels[:max_seq_length]})
    return encoded


def conversation_pieces(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, train_on_prompt: bool = False
) -> list[Piece]:
    """The conversation's text in order; joined, it is what the chat template renders.

    Raises:
        DataError: the chat template changes a message's text or refuses the conversation.
    """
    messages = conversation.messages
    template = _template(tokenizer, _shape(messages), conversation.source)
    pieces = []
    for number, message in enumerate(messages):
        trained = (message["role"] == "assistant" or train_on_prompt) and message.get("train", True)
        pieces.append(Piece(text=template.opening[number], content=False, trained=train_on_prompt and trained))
        left, right = template.strips[number]
        content = message["content"]
        content = content.lstrip() if left else content
        content = content.rstrip() if right else content
        pieces.append(Piece(text=content, content=True, trained=trained))
        pieces.append(Piece(text=template.closing[number], content=False, trained=trained))
    return [piece for piece in pieces if piece.text]


def render_prompt(messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a conversation up to the place where the assistant answers, as in training.

    Args:
        messages: ending with the user's.
    """
    answered = [*messages, {"role": "assistant", "content": "…"}]
    answered = [message | {"train": True} for message in answered]
    encoded = encode(Conversation(messages=answered, source="prompt"), tokenizer, 1 << 30)
    last = len(encoded["labels"]) - 1
    while last and encoded["labels"][last - 1] != IGNORED:
        last -= 1
    return encoded["input_ids"][:last]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids with which the template ends an answer; generation stops at any of them."""
    shape = (("user", False), ("assistant", False))
    closing = _template(tokenizer, shape, "template").closing[-1]
    ids = _template_ids(tokenizer, closing)[:1]
    return ids or [tokenizer.eos_token_id]


def _shape(messages: Sequence[dict[str, Any]]) -> tuple[tuple[str, bool], ...]:
    return tuple((message["role"], message["content"] == "") for message in messages)


def _template(tokenizer: PreTrainedTokenizerBase, shape: tuple[tuple[str, bool], ...], source: str) -> Template:
    cached = _template_cache(tokenizer)
    # Some tokenizers have several templates by name; rendering takes the default one.
    key = (str(tokenizer.chat_template), shape)
    if key not in cached:
        cached[key] = _look_at_template(tokenizer, shape, source)
    return cached[key]


@functools.lru_cache(maxsize=8)
def _template_cache(tokenizer: PreTrainedTokenizerBase) -> dict[Any, Template]:
    return {}


def _look_at_template(
    tokenizer: PreTrainedTokenizerBase, shape: tuple[tuple[str, bool], ...], source: str
) -> Template:
    """Renders the template with a mark in place of each content and sees what stands around the marks."""
    marks = [_MARK.format(number) for number in range(len(shape))]
    messages = [
        {"role": role, "content": "" if empty else _PAD + mark + _PAD}
        for (role, empty), mark in zip(shape, marks, strict=True)
    ]
    strips = [(False, False)] * len(shape)

    def around(count: int) -> list[str]:
        """The text before each of the first messages, and what follows the last of them."""
        try:
            text = tokenizer.apply_chat_template(messages[:count], tokenize=False)
        except Exception as error:
            # A template is a program of its own: what it raises is what it has against the conversation.
            raise DataError(f"{source}: the chat template refuses the conversation: {error}") from error
        found, end = [], 0
        for number in range(count):
            if not messages[number]["content"]:
                # An empty message has no place of its own: what stands there belongs to the next.
                found.append("")
                continue
            start = text.find(marks[number], end)
            if start < 0:
                raise DataError(f"{source}: the chat template leaves out or changes message {number + 1}")
            behind = start + len(marks[number])
            left, right = start > end and text[start - 1] == _PAD, text[behind : behind + 1] == _PAD
            strips[number] = (not left, not right)
            found.append(text[end : start - left])
            end = behind + right
        return [*found, text[end:]]

    opening, closing = around(len(shape)), [""] * len(shape)
    last = opening[-1]
    for number, (role, empty) in enumerate(shape):
        if role == "assistant" and not empty:
            # Only answers: some templates refuse a conversation that ends with another message.
            ended = around(number + 1)[-1] if number < _LOOKED_AT_MESSAGES else last
            following = next((place for place in range(number + 1, len(shape)) if not shape[place][1]), len(shape))
            # An earlier answer may be closed otherwise than a last one: what both have is its end.
            closing[number] = _common_start(tokenizer, ended, opening[following])
            opening[following] = opening[following].removeprefix(closing[number])
    closing[-1] += opening.pop()
    return Template(opening=tuple(opening), closing=tuple(closing), strips=tuple(strips))


def _common_start(tokenizer: PreTrainedTokenizerBase, one: str, other: str) -> str:
    """The longest text of whole tokens that both begin with."""
    common = os.path.commonprefix([one, other])  # noqa: RUF071  letters are meant
    ids = [_template_ids(tokenizer, text) for text in (one, other)]
    # Two special tokens may begin with the same letters.
    while common and any(
        _template_ids(tokenizer, common) != of_text[: len(_template_ids(tokenizer, common))] for of_text in ids
    ):
        common = common[:-1]
    return common


def _template_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    known = _template_cache(tokenizer)
    key = ("ids", text)
    if key not in known:
        known[key] = tokenizer.encode(text, add_special_tokens=False) if text else []
    return known[key]


def _content_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], letters: bool) -> list[list[int]]:
    if not texts:
        return []
    if not tokenizer.is_fast:
        return [tokenizer.encode(text, add_special_tokens=False, split_special_tokens=letters) for text in texts]
    # Past transformers' own call, which makes offsets and masks that nobody reads here.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    before, backend.encode_special_tokens = backend.encode_special_tokens, letters
    try:
        return [item.ids for item in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before
