"""Token ids and labels of a conversation, derived from the chat template itself: only answers are trained on.

A chat template is a program (Jinja) that cannot be inverted. It is rendered once for each sequence of roles with a
placeholder instead of each message's content; what surrounds the placeholders is the same for every conversation
with these roles.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hynb.data.files import Conversation
from hynb.errors import DataError

IGNORED = -100
# Private-use characters, which no template writes itself.
_PLACEHOLDER = "\ue000{}\ue001"
# White space (an em space) that no template writes itself: where it is missing, the template strips contents.
_PADDING = "\u2003"
# How many messages are probed for how the template ends an answer that is the last of its conversation. The time
# grows with the square of it; a later answer is taken to end as the conversation does.
_PROBED_MESSAGES = 32
# Of each message: its role, and whether its content is empty.
Shape = tuple[tuple[str, bool], ...]


@dataclass(kw_only=True, frozen=True)
class Template:
    """What a chat template writes around the contents of messages with given roles.

    Args:
        opening: the text before each content, without the text that ends the answer before it.
        closing: the text that ends each answer, which is trained on; empty for other messages, except that the
            last message has all text after it.
        strips: for each message, whether white space is stripped from the left and the right end of its content.
    """

    opening: tuple[str, ...]
    closing: tuple[str, ...]
    strips: tuple[tuple[bool, bool], ...]


@dataclass(kw_only=True, frozen=True)
class Piece:
    """A part of a conversation's text.

    Args:
        content: whether it is a message's content, as opposed to the template's own text.
        trained: whether it is trained on.
    """

    text: str
    content: bool
    trained: bool


@dataclass(kw_only=True, frozen=True)
class LabelOptions:
    """What is trained on, and how contents are tokenised.

    Args:
        train_on_prompt: system and user messages too, with the template's text around them.
        allow_special_tokens_in_text: text in a content that spells a special token becomes the token.
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
    """Token ids and labels of a conversation, truncated to `max_seq_length` tokens.

    Labels are the ids of the assistant's answers with the text that ends them in the template, and -100 elsewhere:
    for the prompt, for the marker that begins an answer, and for messages with `"train": false`. Text in a content
    that spells a special token stays text.

    Returns:
        `input_ids` and `labels`, equally long.

    Raises:
        DataError: the chat template changes a content or refuses the conversation.
    """
    return encode_many([conversation], tokenizer, max_seq_length, options)[0]


def encode_many(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    options: LabelOptions = DEFAULT,
) -> list[dict[str, list[int]]]:
    """`encode` of several conversations, tokenised together, which takes about half the time.

    Raises:
        DataError: as `encode`, for one of the conversations.
    """
    pieces = [conversation_pieces(item, tokenizer, options.train_on_prompt) for item in conversations]
    texts = [piece.text for of_one in pieces for piece in of_one if piece.content]
    contents = iter(_content_ids(tokenizer, texts, options.allow_special_tokens_in_text))
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
    """The conversation's text in pieces; joined, they are what the chat template renders.

    Raises:
        DataError: the chat template changes a content or refuses the conversation.
    """
    messages = conversation.messages
    template = _template_of(tokenizer, messages, conversation.source)
    pieces = []
    for number, message in enumerate(messages):
        trained = (message["role"] == "assistant" or train_on_prompt) and message.get("train", True)
        pieces.append(Piece(text=template.opening[number], content=False, trained=train_on_prompt and trained))
        strip_left, strip_right = template.strips[number]
        content = message["content"]
        content = content.lstrip() if strip_left else content
        content = content.rstrip() if strip_right else content
        pieces.append(Piece(text=content, content=True, trained=trained))
        pieces.append(Piece(text=template.closing[number], content=False, trained=trained))
    return [piece for piece in pieces if piece.text]


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], source: str) -> str:
    """The text that the chat template makes of messages.

    Raises:
        DataError: the template refuses them.
    """
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    try:
        text = tokenizer.apply_chat_template(plain, tokenize=False)
    except Exception as error:
        # A template raises exceptions of any kind for a conversation that it does not support.
        raise DataError(f"{source}: the chat template refuses the conversation: {error}") from error
    assert isinstance(text, str)
    return text


def render_prompt(messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a conversation up to where the assistant's answer begins, the same as in training.

    Args:
        messages: the last one is the user's.

    Raises:
        DataError: as `encode`.
    """
    answered = [*messages, {"role": "assistant", "content": "…"}]
    conversation = Conversation(messages=[message | {"train": True} for message in answered], source="prompt")
    encoded = encode(conversation, tokenizer, 1 << 30)
    end = len(encoded["labels"])
    while end and encoded["labels"][end - 1] != IGNORED:
        end -= 1
    return encoded["input_ids"][:end]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids at which generation stops: the token that ends an answer in the template, or the tokenizer's eos token."""
    exchange = [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]
    closing = _template_of(tokenizer, exchange, "template").closing[-1]
    eos = tokenizer.eos_token_id
    return _template_ids(tokenizer, closing)[:1] or ([eos] if isinstance(eos, int) else [])


@dataclass
class _Cache:
    """What is known of a tokenizer: templates by their text and shape, and ids by text of the template."""

    templates: dict[tuple[str, Shape], Template] = field(default_factory=dict)
    ids: dict[str, list[int]] = field(default_factory=dict)


@functools.lru_cache(maxsize=8)
def _cache_of(tokenizer: PreTrainedTokenizerBase) -> _Cache:
    return _Cache()


def _template_of(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], source: str) -> Template:
    templates = _cache_of(tokenizer).templates
    shape = tuple((message["role"], message["content"] == "") for message in messages)
    # Some tokenizers have several templates by name; rendering uses the default one.
    key = (str(tokenizer.chat_template), shape)
    if key not in templates:
        templates[key] = _probe(tokenizer, shape, source)
    return templates[key]


def _probe(tokenizer: PreTrainedTokenizerBase, shape: Shape, source: str) -> Template:
    """Finds what the template writes around contents by rendering placeholders.

    Raises:
        DataError: the template leaves out or changes a content, or refuses the conversation.
    """
    messages = [
        {"role": role, "content": "" if empty else _PADDING + _PLACEHOLDER.format(number) + _PADDING}
        for number, (role, empty) in enumerate(shape)
    ]

    def surroundings(count: int) -> _Surroundings:
        text = render(tokenizer, messages[:count], source)
        return _surroundings(text, shape[:count], source)

    whole = surroundings(len(shape))
    opening, closing = list(whole.texts), [""] * len(shape)
    for number, (role, empty) in enumerate(shape):
        # Only answers are probed as the last message: some templates refuse to end with another one.
        if role == "assistant" and not empty:
            probed = number < min(_PROBED_MESSAGES, len(shape) - 1)
            as_last = (surroundings(number + 1) if probed else whole).texts[-1]
            following = next((later for later in range(number + 1, len(shape)) if not shape[later][1]), len(shape))
            # An earlier answer may be followed by other text than the last one: what they share ends an answer.
            closing[number] = _common_start(tokenizer, as_last, opening[following])
            opening[following] = opening[following].removeprefix(closing[number])
    closing[-1] += opening.pop()
    return Template(opening=tuple(opening), closing=tuple(closing), strips=whole.strips)


@dataclass(kw_only=True, frozen=True)
class _Surroundings:
    """What a rendering has around its placeholders.

    Args:
        texts: the text before each placeholder, and the text after the last; one more than messages.
        strips: for each message, whether the padding on its left and its right is missing.
    """

    texts: tuple[str, ...]
    strips: tuple[tuple[bool, bool], ...]


def _surroundings(text: str, shape: Shape, source: str) -> _Surroundings:
    texts, strips, end = [], [], 0
    for number, (_, empty) in enumerate(shape):
        if empty:
            # An empty content has no location: all text around it counts as before the next one.
            texts.append("")
            strips.append((False, False))
            continue
        placeholder = _PLACEHOLDER.format(number)
        start = text.find(placeholder, end)
        if start < 0:
            raise DataError(f"{source}: the chat template leaves out or changes message {number + 1}")
        after = start + len(placeholder)
        padded_left = start > end and text[start - 1] == _PADDING
        padded_right = text[after : after + 1] == _PADDING
        strips.append((not padded_left, not padded_right))
        texts.append(text[end : start - padded_left])
        end = after + padded_right
    return _Surroundings(texts=(*texts, text[end:]), strips=tuple(strips))


def _common_start(tokenizer: PreTrainedTokenizerBase, one: str, other: str) -> str:
    """The longest text of whole tokens with which both begin."""
    common = os.path.commonprefix([one, other])  # noqa: RUF071  works on text, not only on paths
    ids = [_template_ids(tokenizer, text) for text in (one, other)]
    # Two special tokens may begin with the same characters.
    while common and any(
        _template_ids(tokenizer, common) != of_text[: len(_template_ids(tokenizer, common))] for of_text in ids
    ):
        common = common[:-1]
    return common


def _template_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of text that the template writes, in which special tokens count as such."""
    known = _cache_of(tokenizer).ids
    if text not in known:
        known[text] = tokenizer.encode(text, add_special_tokens=False) if text else []
    return known[text]


def _content_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], allow_special_tokens: bool) -> list[list[int]]:
    """Ids of each content; unless allowed, text that spells a special token stays text."""
    if not texts:
        return []
    split = not allow_special_tokens
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return [tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split) for text in texts]
    # transformers' own call also makes offsets and masks, which takes time and is not needed.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    before, backend.encode_special_tokens = backend.encode_special_tokens, split
    try:
        return [item.ids for item in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before
