"""Token ids and labels of a conversation: only what the model is to produce is trained on."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from hynb.data.contents import notes_on
from hynb.data.files import Conversation
from hynb.data.ignored import ignored_fields, is_asked_as_trained, switch_problem
from hynb.data.message_forms import THOUGHT_FIELDS
from hynb.data.pieces import (
    DEFAULT,
    IGNORED,
    LabelOptions,
    Piece,
    Prepared,
    Segment,
    pieces,
    special_ids,
    split,
    text_ids,
    trained_spans,
)
from hynb.data.placeholders import BREAK, Rendered
from hynb.data.plain_forms import MEANINGFUL, plain_forms
from hynb.data.records import is_thought_alone
from hynb.data.template import ChatTemplate
from hynb.errors import DataError


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
    return encode_prepared(prepared, tokenizer, max_seq_length)


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
    if (plain := plain_forms(tokenizer, template, options).prepared(conversation)) is not None:
        return plain
    chosen, ignored, unknown = template_arguments(template, conversation, options, checked=checked)
    lost = [] if options.split_turns or checked else template.shortened_turns(chosen)
    if lost and options.train_on_turns == "all":
        raise DataError(
            f"{conversation.source}: the chat template shortens message {lost[0] + 1} because later messages follow "
            "it, as templates do with thoughts: train each answer with its own history by split_turns: true, or as "
            "the template renders it by train_on_turns: as_rendered"
        )
    rendered = template.render(chosen, allow_special_tokens=options.allow_special_tokens_in_text)
    found = list(pieces(rendered.text, trained_spans(chosen, rendered, options), template.special))
    return Prepared(
        segments=[_segment(piece, tokenizer) for piece in found],
        texts=[piece.text for piece in found if not piece.special],
        ignored=tuple(ignored),
        unknown=tuple(unknown),
        shortened=len(lost),
        notes=_notes(chosen, rendered),
        spelled=any(template.added.search(message["content"] or "") for message in conversation.messages),
        special_tokens_allowed=options.allow_special_tokens_in_text,
    )


def _notes(conversation: Conversation, rendered: Rendered) -> tuple[str, ...]:
    """What a user may not expect of how the template writes answers with thoughts."""
    answers = [message["content"] or "" for message in conversation.messages if message["role"] == "assistant"]
    found = [
        note
        for content, (start, end) in zip(answers, rendered.trained, strict=True)
        for note in notes_on(content, rendered.text[start:end].replace(BREAK, ""))
    ]
    return tuple(dict.fromkeys(found))


def _segment(piece: Piece, tokenizer: PreTrainedTokenizerBase) -> Segment:
    return (array("I", special_ids(tokenizer, piece.text)) if piece.special else None), piece.trained


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


@dataclass(kw_only=True, frozen=True)
class Encoded:
    """Several samples, one behind the other.

    Args:
        ids: token ids, uint32 of shape (tokens,).
        trained: whether each token has a label, bool of shape (tokens,).
        starts: where each sample begins, and the end of the last one; int64 of shape (samples + 1,).
    """

    ids: np.ndarray
    trained: np.ndarray
    starts: np.ndarray


def encode_together(prepared: Sequence[Prepared], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Token ids and labels of prepared conversations, whole."""
    allowed = any(item.special_tokens_allowed for item in prepared)
    of_texts = text_ids(tokenizer, [text for item in prepared for text in item.texts], allowed)
    ids = array("I")
    sizes: list[int] = []
    flags: list[bool] = []
    starts = [0]
    for item in prepared:
        for known, trained in item.segments:
            before = len(ids)
            if known is None:
                ids.fromlist(next(of_texts))
            else:
                ids.extend(known)
            sizes.append(len(ids) - before)
            flags.append(trained)
        starts.append(len(ids))
    trained_tokens = np.repeat(np.array(flags, dtype=bool), np.array(sizes, dtype=np.int64))
    return Encoded(
        ids=np.frombuffer(ids, dtype=np.uint32) if ids else np.zeros(0, np.uint32),
        trained=trained_tokens,
        starts=np.array(starts, dtype=np.int64),
    )


def encode_prepared(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> dict[str, list[int]]:
    """Token ids and labels of a prepared conversation, as `encode` returns them."""
    encoded = encode_together([prepared], tokenizer)
    return as_sample(encoded.ids[:max_seq_length], encoded.trained[:max_seq_length])


def as_sample(ids: np.ndarray, trained: np.ndarray) -> dict[str, list[int]]:
    """`input_ids` and `labels` as lists.

    Args:
        ids: of shape (tokens,).
        trained: whether each token has a label, bool of the same shape.
    """
    return {"input_ids": ids.tolist(), "labels": np.where(trained, ids.astype(np.int64), IGNORED).tolist()}


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
    if (nested := known.pop("chat_template_kwargs", None)) is not None:
        if not isinstance(nested, Mapping):
            raise DataError(f"{conversation.source}: chat_template_kwargs must be an object of arguments by name")
        if twice := sorted(name for name in nested if name in known and known[name] != nested[name]):
            raise DataError(
                f"{conversation.source}: {', '.join(twice)} and chat_template_kwargs.{twice[0]} have different "
                "values: keep one of them"
            )
        known |= nested
    read = {name: value for name, value in known.items() if name in template.record_arguments}
    unknown = [name for name in known if name not in read and name not in MEANINGFUL]
    meaningful = {name: value for name, value in known.items() if name in read or name in MEANINGFUL}
    chosen = conversation.replaced(arguments=meaningful)
    ignored: list[str] = []
    if not checked and (meaningful or any(message.keys() - _PLAIN_FIELDS for message in conversation.messages)):
        ignored = [name for name in ignored_fields(template, chosen) if not _is_redundant(name, chosen)]
        asked = [name for name in ignored if is_asked_as_trained(template, chosen, name)]
        ignored = [name for name in ignored if name not in asked]
        if ignored and not options.allow_ignored_fields:
            if problem := _result_problem(conversation, ignored):
                raise DataError(f"{conversation.source}: {problem}")
            if "enable_thinking" in ignored and (problem := switch_problem(template, chosen)):
                raise DataError(
                    f"{conversation.source}: the chat template does not render {problem}, remove enable_thinking, or "
                    "set allow_ignored_fields: true to train without it"
                )
            raise DataError(
                f"{conversation.source}: the chat template does not render {', '.join(ignored)}, so the model would "
                f"not learn from it: use a model whose template does, {_advice(ignored)}remove it from the data, or "
                "set allow_ignored_fields: true to train without it"
            )
        _check_what_is_left(conversation, ignored)
        ignored += [f"{name} (in the prompt alone)" for name in asked]
    return conversation.replaced(arguments=read), ignored, unknown


def _advice(ignored: Sequence[str]) -> str:
    """What else can be done about a thought that the template does not render."""
    if any(name in ignored for name in THOUGHT_FIELDS):
        return "write a thought into its message as reasoning_content, "
    if any(f"messages[].{name}" in ignored for name in THOUGHT_FIELDS):
        return "write the thought into the content where the model's answers have it (<think>…</think>), "
    return ""


def _check_what_is_left(conversation: Conversation, ignored: Sequence[str]) -> None:
    """Refuses an answer of which nothing is left without the fields that are ignored.

    Raises:
        DataError: its thought or its tool calls are ignored, and it has no content.
    """
    thoughts_ignored = any(f"messages[].{name}" in ignored for name in THOUGHT_FIELDS)
    for number, message in enumerate(conversation.messages, 1):
        calls_alone = bool(message.get("tool_calls")) and not (message.get("content") or "").strip()
        if thoughts_ignored and is_thought_alone(message):
            what = "its thought"
        elif calls_alone and "messages[].tool_calls" in ignored:
            what = "its tool calls"
        else:
            continue
        raise DataError(
            f"{conversation.source}: message {number}: the assistant's answer is empty but for {what}, which the "
            "chat template does not render: write the answer, or remove the record"
        )


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


def _result_problem(conversation: Conversation, ignored: Sequence[str]) -> str:
    """Where a result of a tool is not at the place of its call, under a template that shows no ids or names."""
    calls: list[dict[str, Any]] = []
    count = 0
    for number, message in enumerate(conversation.messages, 1):
        if message["role"] == "assistant":
            calls, count = message.get("tool_calls") or [], 0
        if message["role"] != "tool" or count >= len(calls):
            continue
        ids, names = [call.get("id") for call in calls], [call["function"]["name"] for call in calls]
        for field, known in (("tool_call_id", ids), ("name", names)):
            given, expected = message.get(field), known[count]
            if f"messages[].{field}" not in ignored or None in (given, expected) or given == expected:
                continue
            ignores = f"the chat template does not render messages[].{field}, and message {number} is the result of"
            if given in known:
                return f"{ignores} {given!r} where that of {expected!r} belongs: put results in the order of calls"
            if field == "tool_call_id":
                return f"{ignores} {given!r}, which none of the calls before it has as its id: correct it"
        count += 1
    return ""


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
    found = list(split(template.prompt(messages, given), template.special, trained=False))
    texts = text_ids(tokenizer, [piece.text for piece in found if not piece.special], False)
    ids = [special_ids(tokenizer, piece.text) if piece.special else next(texts) for piece in found]
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
    found = [token_id for token in tokens for token_id in special_ids(tokenizer, token)]
    eos = tokenizer.eos_token_id
    return list(dict.fromkeys([*found, *([eos] if isinstance(eos, int) else [])]))
