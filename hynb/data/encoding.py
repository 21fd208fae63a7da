"""Token ids and labels of a conversation: only what the model is to produce is trained on."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hynb.data.files import Conversation
from hynb.data.message_forms import THOUGHT_FIELDS
from hynb.data.records import is_thought_alone
from hynb.data.template import BREAK, ChatTemplate, Rendered
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


def encode(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    options: LabelOptions = DEFAULT,
    *,
    checked: bool = False,
) -> dict[str, list[int]]:
    """Token ids and labels of a conversation, truncated to `max_seq_length` tokens.

    Labels are the ids of the assistant's answers with their end tokens, and -100 elsewhere: for the prompt, for what
    begins an answer in the template, for results of tools, and for messages with `"train": false`. Text in a message
    that spells a special token stays text.

    Args:
        checked: an earlier call has found that the template renders all fields; they are not looked at again.

    Returns:
        `input_ids` and `labels`, equally long.

    Raises:
        DataError: the chat template changes or refuses the conversation, does not render one of its fields, or writes
            no end token after an answer.
    """
    prepared = prepare(conversation, tokenizer, options, checked=checked)
    return encode_prepared([prepared], tokenizer, max_seq_length)[0]


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
    return encode_prepared([prepare(item, tokenizer, options) for item in conversations], tokenizer, max_seq_length)


@dataclass(kw_only=True, frozen=True)
class Prepared:
    """A conversation that is ready to be tokenised.

    Args:
        pieces: its rendered text in order.
        ignored: fields that the template does not render, where `allow_ignored_fields` is on.
        unknown: the record's keys that nothing reads.
        shortened: number of answers that the template shortens.
        spelled: whether a message spells a special token.
    """

    pieces: list[Piece]
    ignored: tuple[str, ...]
    unknown: tuple[str, ...]
    shortened: int
    spelled: bool
    special_tokens_allowed: bool


def prepare(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    options: LabelOptions = DEFAULT,
    *,
    checked: bool = False,
) -> Prepared:
    """Renders a conversation and divides its text.

    Args:
        checked: an earlier call has found that the template renders all fields; they are not looked at again.

    Raises:
        DataError: as `encode`.
    """
    template = ChatTemplate.of(tokenizer, conversation.arguments.get("tools"))
    chosen, ignored, unknown = template_arguments(template, conversation, options, checked=checked)
    lost = [] if options.split_turns or checked else template.shortened_turns(chosen)
    if lost and options.train_on_turns == "all":
        raise DataError(
            f"{conversation.source}: the chat template shortens message {lost[0] + 1} because later messages follow "
            "it, as templates do with thoughts: train each answer with its own history by split_turns: true, or as "
            "the template renders it by train_on_turns: as_rendered"
        )
    rendered = template.render(chosen, allow_special_tokens=options.allow_special_tokens_in_text)
    return Prepared(
        pieces=_pieces(chosen, rendered, template, options),
        ignored=tuple(ignored),
        unknown=tuple(unknown),
        shortened=len(lost),
        spelled=any(template.added.search(message["content"] or "") for message in conversation.messages),
        special_tokens_allowed=options.allow_special_tokens_in_text,
    )


def render(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, options: LabelOptions = DEFAULT
) -> Rendered:
    """The text that a conversation is trained as.

    Raises:
        DataError: as `encode`.
    """
    template = ChatTemplate.of(tokenizer, conversation.arguments.get("tools"))
    chosen, _, _ = template_arguments(template, conversation, options)
    return template.render(chosen, allow_special_tokens=options.allow_special_tokens_in_text)


def encode_prepared(
    prepared: Sequence[Prepared], tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> list[dict[str, list[int]]]:
    """Token ids and labels of prepared conversations, as `encode` returns them."""
    texts = [piece.text for item in prepared for piece in item.pieces if not piece.special]
    allowed = any(item.special_tokens_allowed for item in prepared)
    text_ids = iter(_text_ids(tokenizer, texts, allowed))
    encoded = []
    for item in prepared:
        input_ids: list[int] = []
        labels: list[int] = []
        for piece in item.pieces:
            ids = _special_ids(tokenizer, piece.text) if piece.special else next(text_ids)
            input_ids.extend(ids)
            labels.extend(ids if piece.trained else [IGNORED] * len(ids))
        encoded.append({"input_ids": input_ids[:max_seq_length], "labels": labels[:max_seq_length]})
    return encoded


def answer_count(conversation: Conversation) -> int:
    """Number of answers of a conversation, of which `split_turns` makes a sample each."""
    return sum(message["role"] == "assistant" for message in conversation.messages)


def up_to_answer(conversation: Conversation, number: int) -> Conversation | None:
    """A conversation up to one of its answers, counted from 1; None if that answer has `"train": false`."""
    indices = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    index = indices[number - 1]
    if not conversation.messages[index].get("train", True):
        return None
    return conversation.replaced(messages=conversation.messages[: index + 1])


def template_arguments(
    template: ChatTemplate,
    conversation: Conversation,
    options: LabelOptions = DEFAULT,
    *,
    checked: bool = False,
) -> tuple[Conversation, list[str], list[str]]:
    """A conversation with what the template reads, the fields that it ignores, and keys that have no meaning to it.

    Raises:
        DataError: the template ignores a field that has a meaning, and `allow_ignored_fields` is off.
    """
    known = {**conversation.arguments}
    # The form of several data sets: arguments of the template in a mapping of their own.
    if isinstance(nested := known.pop("chat_template_kwargs", None), Mapping):
        known |= nested
    read = {name: value for name, value in known.items() if name in template.record_arguments}
    unknown = [name for name in known if name not in read and name not in _MEANINGFUL]
    meaningful = {name: value for name, value in known.items() if name in read or name in _MEANINGFUL}
    chosen = conversation.replaced(arguments=meaningful)
    ignored: list[str] = []
    if not checked and (meaningful or any(message.keys() - _PLAIN_FIELDS for message in conversation.messages)):
        ignored = [name for name in template.ignored_fields(chosen) if not _is_redundant(name, chosen)]
        if ignored and not options.allow_ignored_fields:
            raise DataError(
                f"{conversation.source}: the chat template does not render {', '.join(ignored)}, so the model would "
                "not learn from it: use a model whose template does, remove it from the data, or set "
                "allow_ignored_fields: true to train without it"
            )
        _check_thoughts_alone(conversation, ignored)
    return conversation.replaced(arguments=read), ignored, unknown


def _check_thoughts_alone(conversation: Conversation, ignored: Sequence[str]) -> None:
    """Refuses an answer of which nothing is left without the fields that are ignored.

    Raises:
        DataError: its thought is ignored, and it has no content.
    """
    if not any(f"messages[].{name}" in ignored for name in THOUGHT_FIELDS):
        return
    for number, message in enumerate(conversation.messages, 1):
        if is_thought_alone(message):
            raise DataError(
                f"{conversation.source}: message {number}: the assistant's answer is empty but for its thought, "
                "which the chat template does not render: write the answer, or remove the record"
            )


# Keys of a record that say something about the conversation, whether or not a template reads them.
_MEANINGFUL = frozenset({"tools", "reasoning_effort", "documents"})
_PLAIN_FIELDS = frozenset({"role", "content", "train"})


def _is_redundant(name: str, conversation: Conversation) -> bool:
    """Whether a field of messages that is not rendered says only what the order of the messages says too."""
    if name not in ("messages[].tool_call_id", "messages[].name"):
        return False
    pending: list[dict[str, Any]] = []
    for message in conversation.messages:
        if message["role"] == "assistant":
            pending = list(message.get("tool_calls") or ())
        elif message["role"] == "tool" and pending:
            call = pending.pop(0)
            names = {"messages[].tool_call_id": call.get("id"), "messages[].name": call["function"]["name"]}
            given = message.get(name.removeprefix("messages[]."))
            if given is not None and names[name] is not None and given != names[name]:
                return False
        elif name == "messages[].name" and message.get("name"):
            return False
    return True


def _pieces(
    conversation: Conversation, rendered: Rendered, template: ChatTemplate, options: LabelOptions
) -> list[Piece]:
    pieces: list[Piece] = []
    position, length = 0, len(rendered.text)
    for start, end in [*_trained_spans(conversation, rendered, options), (length, length)]:
        for text, is_trained in ((rendered.text[position:start], False), (rendered.text[start:end], True)):
            pieces += _split(text, template.special, is_trained)
        position = end
    return pieces


def _trained_spans(conversation: Conversation, rendered: Rendered, options: LabelOptions) -> list[tuple[int, int]]:
    answers = [message for message in conversation.messages if message["role"] == "assistant"]
    last_only = options.train_on_turns == "last" or options.split_turns
    kept = [
        (span, bool(message.get("train", True)) and (not last_only or number + 1 == len(answers)))
        for number, (message, span) in enumerate(zip(answers, rendered.trained, strict=True))
    ]
    if not options.train_on_prompt:
        return [span for span, is_kept in kept if is_kept]
    # Everything but the answers that are not trained on.
    spans, position = [], 0
    for (start, end), is_kept in kept:
        if not is_kept:
            spans.append((position, start))
            position = end
    return [span for span in [*spans, (position, len(rendered.text))] if span[0] < span[1]]


def _split(text: str, pattern: re.Pattern[str], trained: bool) -> Iterable[Piece]:
    position = 0
    for match in pattern.finditer(text):
        if match.start() > position:
            yield Piece(text=text[position : match.start()].replace(BREAK, ""), special=False, trained=trained)
        yield Piece(text=match[0], special=True, trained=trained)
        position = match.end()
    if position < len(text):
        yield Piece(text=text[position:].replace(BREAK, ""), special=False, trained=trained)


def render_prompt(
    messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a conversation up to where the assistant's answer begins.

    Args:
        messages: the last one is the user's or a tool's result.
        arguments: of the template, such as `tools` and `reasoning_effort`.

    Raises:
        DataError: the template refuses the messages.
    """
    given = arguments or {}
    template = ChatTemplate.of(tokenizer, given.get("tools"))
    pieces = list(_split(template.prompt(messages, given), template.special, trained=False))
    texts = iter(_text_ids(tokenizer, [piece.text for piece in pieces if not piece.special], False))
    ids = [_special_ids(tokenizer, piece.text) if piece.special else next(texts) for piece in pieces]
    return [token_id for of_piece in ids for token_id in of_piece]


def trained_text(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a conversation's last answer is trained to be: its text from the generation prompt to the end token.

    Raises:
        DataError: as `encode`.
    """
    template = ChatTemplate.of(tokenizer, conversation.arguments.get("tools"))
    rendered = template.render(conversation)
    start, end = rendered.trained[-1]
    return rendered.text[start:end].replace(BREAK, "")


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids at which generation stops: the token that ends an answer in the template, and the tokenizer's eos token."""
    tokens = sorted(ChatTemplate.of(tokenizer).end_tokens)
    found = [token_id for token in tokens for token_id in _special_ids(tokenizer, token)]
    eos = tokenizer.eos_token_id
    return list(dict.fromkeys([*found, *([eos] if isinstance(eos, int) else [])]))


@functools.lru_cache(maxsize=8)
def _special_cache(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    return {}


def _special_ids(tokenizer: PreTrainedTokenizerBase, token: str) -> list[int]:
    known = _special_cache(tokenizer)
    if token not in known:
        known[token] = tokenizer.encode(token, add_special_tokens=False)
    return known[token]


def _text_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], allow_special_tokens: bool) -> list[list[int]]:
    """Ids of each text; unless allowed, what spells a special token stays text."""
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
