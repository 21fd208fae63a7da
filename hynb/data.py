"""Training data: JSONL conversations to token ids and labels, answers alone trained on."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hynb.errors import DataError

IGNORED = -100
ROLES = ("system", "user", "assistant")
_SHOWN_PROBLEMS = 20
# Stands for message number N while the template is looked at: private-use characters that no text holds.
_MARK = "\ue000{}\ue001"


@dataclass(kw_only=True, frozen=True)
class Conversation:
    """One sample: its messages, and where it stands as file:line."""

    messages: list[dict[str, Any]]
    source: str


@dataclass(kw_only=True, frozen=True)
class Template:
    """What a chat template writes around the messages of a conversation.

    before: the text before each message's content.
    closing: for each message, the text that follows it when the conversation ends there.
    """

    before: tuple[str, ...]
    closing: tuple[str, ...]


def read_conversations(path: str | Path) -> Iterator[Conversation]:
    """The conversations of a JSONL file in order; blank lines are passed over.

    Raises:
        DataError: at the first line that is none, with file:line and what is wrong.
    """
    for source, line in _lines(Path(path)):
        yield parse_line(line, source)


def parse_line(line: bytes, source: str) -> Conversation:
    """One line as a conversation.

    Raises:
        DataError: with the line's place, what is wrong and an excerpt.
    """
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: is no UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{source}:{error.colno}: no valid JSON: {error.msg}; the line begins {_excerpt(line)}"
        ) from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{source}: no readable JSON: {error or 'nested too deeply'}") from None
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f'{source}: must be {{"messages": [{{"role": …, "content": …}}, …]}}; the line begins {_excerpt(line)}'
        )
    for number, message in enumerate(messages, 1):
        if problem := _message_problem(message, messages[number - 2] if number > 1 else None):
            raise DataError(f"{source}: message {number}: {problem}")
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{source}: the last message is the {messages[-1]['role']}'s: there is no answer to learn")
    return Conversation(messages=messages, source=source)


def check_lines(path: str | Path, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> int:
    """Looks at every line of a file before any GPU is touched; returns how many samples there are.

    Raises:
        DataError: all that is wrong, the first of many in full: broken lines, and samples whose whole answer
            lies behind `max_seq_length`.
    """
    problems, count, samples = [], 0, 0
    for source, line in _lines(Path(path)):
        try:
            conversation = parse_line(line, source)
            samples += 1
            # A token is at least a byte: a shorter line cannot be cut.
            if len(line) > max_seq_length:
                labels = encode(conversation, tokenizer, max_seq_length)["labels"]
                if all(label == IGNORED for label in labels):
                    raise DataError(
                        f"{source}: nothing of the answer is left within max_seq_length = {max_seq_length}: "
                        "raise it, or shorten the question"
                    )
        except DataError as error:
            count += 1
            if len(problems) < _SHOWN_PROBLEMS:
                problems += error.problems
    if count > len(problems):
        problems.append(f"{path}: {count} broken lines in all; the first {_SHOWN_PROBLEMS} are shown")
    if problems:
        raise DataError(problems)
    if not samples:
        raise DataError(f"train_data_file = {path}: is empty; it needs at least one conversation")
    return samples


def encode(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> dict[str, list[int]]:
    """Token ids and labels of a conversation, cut at `max_seq_length` tokens.

    Labels are the ids of the assistant's answers, each with what the template ends it with, and -100 elsewhere:
    never the prompt, never the marker that opens the answer. The letters of a special token inside a
    message stay letters.

    Raises:
        DataError: the chat template changes a message's text or refuses the conversation.
    """
    messages = conversation.messages
    template = _template(tokenizer, _shape(messages), conversation.source)
    contents = [message["content"] for message in messages]
    input_ids: list[int] = []
    labels: list[int] = []

    def add(ids: list[int], trained: bool) -> None:
        input_ids.extend(ids)
        labels.extend(ids if trained else [IGNORED] * len(ids))

    closing = ""
    for number, (message, content) in enumerate(zip(messages, contents, strict=True)):
        # What closes the message before is learnt with it; the rest opens this one.
        opening = template.before[number].removeprefix(closing)
        add(_template_ids(tokenizer, opening), False)
        answer = message["role"] == "assistant"
        add(_text_ids(tokenizer, content), answer)
        closing = template.closing[number]
        if answer or number == len(messages) - 1:
            add(_template_ids(tokenizer, closing), answer)
        else:
            closing = ""
        if len(input_ids) >= max_seq_length:
            break
    return {"input_ids": input_ids[:max_seq_length], "labels": labels[:max_seq_length]}


def render_prompt(messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a conversation up to the place where the assistant answers, as in training.

    Args:
        messages: ending with the user's.
    """
    answered = [*messages, {"role": "assistant", "content": "…"}]
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


class ChatDataset(torch.utils.data.Dataset):
    """Samples read by their offset and tokenised when they are asked for; never the whole file in memory.

    Args:
        path: a JSONL file.
        max_seq_length: tokens; a longer sample is cut.
    """

    def __init__(self, path: str | Path, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> None:
        self.path = Path(path)
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length
        self._places: list[tuple[int, int, int]] = []
        try:
            with self.path.open("rb") as file:
                offset = 0
                for number, line in enumerate(file, 1):
                    if line.strip():
                        self._places.append((offset, len(line), number))
                    offset += len(line)
        except OSError as error:
            raise DataError(f"train_data_file = {path}: cannot be read: {error.strerror}") from None

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return encode(self.conversation(index), self.tokenizer, self.max_seq_length)

    def conversation(self, index: int) -> Conversation:
        """The messages of one sample."""
        offset, size_bytes, number = self._places[index]
        with self.path.open("rb") as file:
            file.seek(offset)
            line = file.read(size_bytes)
        return parse_line(_without_mark(line, number), f"{self.path}:{number}")


@dataclass(kw_only=True)
class Collator:
    """Pads the samples of a batch on the right to its longest."""

    pad_token_id: int

    def __call__(self, samples: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`, each batch × longest."""
        longest = max(len(sample["input_ids"]) for sample in samples)

        def padded(values: list[int], filler: int) -> list[int]:
            return values + [filler] * (longest - len(values))

        return {
            "input_ids": torch.tensor([padded(s["input_ids"], self.pad_token_id) for s in samples]),
            "attention_mask": torch.tensor([padded([1] * len(s["input_ids"]), 0) for s in samples]),
            "labels": torch.tensor([padded(s["labels"], IGNORED) for s in samples]),
        }


def data_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def preview(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> str:
    """A sample as text for a terminal, with what is trained on between ⟦ and ⟧."""
    encoded = encode(conversation, tokenizer, max_seq_length)
    parts, trained = [], False
    for token_id, label in zip(encoded["input_ids"], encoded["labels"], strict=True):
        if (label != IGNORED) != trained:
            trained = not trained
            parts.append(("⟦" if trained else "⟧", None))
        parts.append(("", token_id))
    text, run = "", []
    for sign, token_id in [*parts, ("⟧" if trained else "", None)]:
        if token_id is None:
            text += tokenizer.decode(run) + sign
            run = []
        else:
            run.append(token_id)
    whole = encode(conversation, tokenizer, 1 << 30)["input_ids"]
    cut = len(whole) - len(encoded["input_ids"])
    return text + (f"\n… {cut} tokens are cut at max_seq_length = {max_seq_length}" if cut else "")


def _message_problem(message: Any, before: dict[str, Any] | None) -> str:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return 'must be {"role": …, "content": …}'
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        return f"role {role!r} is unknown; there are {', '.join(ROLES)}"
    if not isinstance(content, str):
        return f"the content of the {role} must be text, not {type(content).__name__}"
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        return f"the content of the {role} holds half of a surrogate pair; write the character itself"
    if role == "system":
        return "" if before is None else "the system's message must be the first"
    if before is None:
        return "" if role == "user" else "the first message is the assistant's; the user's comes before it"
    if role == "assistant" and before["role"] != "user":
        return f"the assistant's message follows the {before['role']}'s; the user's must come before it"
    if role == "user" and before["role"] == "user":
        return "two messages of the user's follow each other"
    if role == "assistant" and not content.strip():
        return "the assistant's answer is empty"
    return ""


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _without_mark(line, number)
    except OSError as error:
        raise DataError(f"train_data_file = {path}: cannot be read: {error.strerror}") from None


def _without_mark(line: bytes, number: int) -> bytes:
    return line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _excerpt(line: bytes) -> str:
    return repr(line[:60].decode("utf-8", errors="replace").strip())


def _shape(messages: Sequence[dict[str, Any]]) -> tuple[tuple[str, bool], ...]:
    return tuple((message["role"], message["content"] == "") for message in messages)


def _template(tokenizer: PreTrainedTokenizerBase, shape: tuple[tuple[str, bool], ...], source: str) -> Template:
    cached = _template_cache(tokenizer)
    key = (tokenizer.chat_template, shape)
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
    messages = [
        {"role": role, "content": "" if empty else _MARK.format(number)} for number, (role, empty) in enumerate(shape)
    ]

    def pieces(count: int) -> list[str]:
        try:
            rest = tokenizer.apply_chat_template(messages[:count], tokenize=False)
        except Exception as error:
            # A template is a program of its own: what it raises is what it has against the conversation.
            raise DataError(f"{source}: the chat template refuses the conversation: {error}") from error
        found = []
        for number in range(count):
            before, mark, rest = rest.partition(messages[number]["content"] or "\ue002")
            if not mark and messages[number]["content"]:
                raise DataError(f"{source}: the chat template leaves out or changes message {number + 1}")
            # An empty message has no place of its own: what stands there belongs to the next.
            found.append(before if mark else "")
            rest = rest if mark else before
        return [*found, rest]

    before = pieces(len(shape))
    closing = []
    for number in range(1, len(shape) + 1):
        empty = messages[number - 1]["content"] == ""
        closing.append("" if empty and number < len(shape) else pieces(number)[-1])
    return Template(before=tuple(before[:-1]), closing=tuple(closing))


def _template_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False) if text else []


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []
