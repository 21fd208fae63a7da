"""A sample's tokens as plain text, in a terminal's colours and as HTML, with the trained ones marked."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from transformers import PreTrainedTokenizerBase

from hynb.data.encoding import encode, render
from hynb.data.files import Conversation
from hynb.data.pieces import DEFAULT, IGNORED, LabelOptions
from hynb.data.placeholders import BREAK

# A browser becomes slow with many more spans than this.
_SHOWN_TOKENS = 4000
# Blue and grey differ for every kind of colour blindness; ⟦ and ⟧ carry the meaning without colour.
_TERMINAL = {"trained": "\x1b[1;34m", "prompt": "\x1b[0m", "cut": "\x1b[9;90m"}
_RESET = "\x1b[0m"
_STYLE = {
    "trained": "background:#cfe3ff;color:#00337a;border-bottom:3px solid #00337a;font-weight:600",
    "prompt": "color:#444;background:#f2f2f2",
    "cut": "color:#777;text-decoration:line-through",
}
# Told apart by shape as well as by colour.
_PART_STYLE = {
    "": "",
    "thought": "font-style:italic;border-top:2px dotted #7a4b00",
    "tool call": "border-top:2px solid #00664d",
    "tool result": "border-top:2px dashed #8a2be2",
}
_TERMINAL_PARTS = {"": "", "thought": "\x1b[3m", "tool call": "\x1b[32m", "tool result": "\x1b[33m"}
# As the published templates write them in an answer.
_PARTS = {
    "thought": re.compile(r"<think[^<>]*>.*?</think[^<>]*>", re.DOTALL),
    "tool call": re.compile(r"<tool_calls?[^<>]*>.*(?:</tool_calls?[^<>]*>)", re.DOTALL),
}


@dataclass(kw_only=True, frozen=True)
class Token:
    """One token, or a few that together are whole characters.

    Args:
        kind: `trained` with a label, `prompt` without one, `cut` beyond max_seq_length.
        part: what of a conversation it belongs to, where that is a thought, a tool call or a tool's result; else "".
    """

    ids: tuple[int, ...]
    text: str
    kind: Literal["trained", "prompt", "cut"]
    part: str = ""


def tokens(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    options: LabelOptions = DEFAULT,
) -> list[Token]:
    """All tokens of a sample, those beyond max_seq_length included.

    Raises:
        DataError: as `encode`.
    """
    whole = encode(conversation, tokenizer, 1 << 30, options)
    labels = whole["labels"]

    def kind(index: int) -> Literal["trained", "prompt", "cut"]:
        if index >= max_seq_length:
            return "cut"
        return "prompt" if labels[index] == IGNORED else "trained"

    part_at = _parts(conversation, tokenizer, options)
    found: list[Token] = []
    run: list[int] = []
    position = 0
    for index, token_id in enumerate(whole["input_ids"]):
        run.append(token_id)
        text = _decoded(tokenizer, run)
        last_of_kind = index + 1 == len(labels) or kind(index + 1) != kind(index)
        # A character may consist of up to four tokens, each of which decodes to a replacement character.
        if "\ufffd" not in text or last_of_kind or len(run) == 4:
            found.append(Token(ids=tuple(run), text=text, kind=kind(index), part=part_at(position)))
            position += len(text)
            run = []
    return found


def _parts(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, options: LabelOptions
) -> Callable[[int], str]:
    """The part of the conversation that a character of its rendering belongs to, by its position."""
    rendered = render(conversation, tokenizer, options)
    spans: list[tuple[int, int, str]] = []
    for message, turn in zip(conversation.messages, rendered.turns, strict=True):
        if turn is None:
            continue
        start, end = (len(rendered.text[:position].replace(BREAK, "")) for position in turn)
        text = rendered.text[turn[0] : turn[1]].replace(BREAK, "")
        if message["role"] == "tool":
            spans.append((start, end, "tool result"))
        elif message["role"] == "assistant":
            for name, pattern in _PARTS.items():
                spans += [(start + match.start(), start + match.end(), name) for match in pattern.finditer(text)]
    return lambda position: next((name for start, end, name in spans if start <= position < end), "")


def as_text(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    *,
    options: LabelOptions = DEFAULT,
    colour: bool = False,
) -> str:
    """A sample as text with the trained tokens between ⟦ and ⟧.

    Args:
        colour: use a terminal's colours, with thoughts in italics, tool calls in green and tools' results in yellow,
            and strike through what is cut; otherwise it is left out and counted.

    Raises:
        DataError: as `encode`.
    """
    found = tokens(conversation, tokenizer, max_seq_length, options)
    text = ""
    for (kind, part), group in groupby(found, key=lambda token: (token.kind, token.part if colour else "")):
        shown = _decoded(tokenizer, [token_id for token in group for token_id in token.ids])
        if colour:
            shown = _TERMINAL[kind] + _TERMINAL_PARTS[part] + shown + _RESET
        elif kind == "cut":
            shown = ""
        text += f"⟦{shown}⟧" if kind == "trained" else shown
    cut = _count(found, "cut")
    return text + (f"\n… {cut} tokens are cut at max_seq_length = {max_seq_length}" if cut else "")


def as_html(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    *,
    options: LabelOptions = DEFAULT,
) -> str:
    """A sample as HTML: a span per token with its ids as tooltip; trained ones coloured and between ⟦ and ⟧.

    Raises:
        DataError: as `encode`.
    """
    found = tokens(conversation, tokenizer, max_seq_length, options)
    body = ""
    for kind, group in groupby(found[:_SHOWN_TOKENS], key=lambda token: token.kind):
        spans = "".join(map(_span, group))
        body += f"⟦{spans}⟧" if kind == "trained" else spans
    total = sum(len(token.ids) for token in found)
    note = f"{html.escape(conversation.source)}: {total} tokens, {_count(found, 'trained')} trained on ⟦ ⟧"
    if cut := _count(found, "cut"):
        note += f", {cut} cut at max_seq_length = {max_seq_length} (struck through)"
    note += f"; the first {_SHOWN_TOKENS:,} are shown" if len(found) > _SHOWN_TOKENS else ""
    if parts := sorted({token.part for token in found} - {""}):
        note += "; " + ", ".join(f'<span style="{_PART_STYLE[part]}">{part}</span>' for part in parts)
    return f'<div style="font-family:monospace;line-height:1.7"><div>{note}</div><div>{body}</div></div>'


def _span(token: Token) -> str:
    title = " · ".join(filter(None, (" ".join(map(str, token.ids)), token.kind, token.part)))
    shown = html.escape(token.text).replace("\n", "↵<br>")
    return f'<span style="{_STYLE[token.kind]};{_PART_STYLE[token.part]}" title="{title}">{shown}</span>'


def _count(found: Sequence[Token], kind: str) -> int:
    return sum(len(token.ids) for token in found if token.kind == kind)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids)
    assert isinstance(text, str)
    return text
