"""A sample's tokens to look at, in plain text, in a terminal's colours and in HTML: trained ones have a sign."""

from __future__ import annotations

import html
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hynb.data.files import Conversation
from hynb.data.template import DEFAULT, IGNORED, LabelOptions, encode

# A page of a million spans would bring the browser to its knees.
_SHOWN_TOKENS = 4000
# Blue and grey differ for every kind of colour blindness; the sign below carries the meaning without any.
_TERMINAL = {"trained": "\x1b[1;34m", "prompt": "\x1b[0m", "cut": "\x1b[9;90m"}
_STYLE = {
    "trained": "background:#cfe3ff;color:#00337a;border-bottom:3px solid #00337a;font-weight:600",
    "prompt": "color:#444;background:#f2f2f2",
    "cut": "color:#777;text-decoration:line-through",
}


@dataclass(kw_only=True, frozen=True)
class Token:
    """One or a few tokens that together make whole characters, and what becomes of them."""

    ids: tuple[int, ...]
    text: str
    kind: str


def tokens(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    options: LabelOptions = DEFAULT,
) -> list[Token]:
    """The whole sample's tokens; kind is `trained`, `prompt`, or `cut` behind max_seq_length."""
    whole = encode(conversation, tokenizer, 1 << 30, options)
    kinds = ["prompt" if label == IGNORED else "trained" for label in whole["labels"]]
    kinds[max_seq_length:] = ["cut"] * len(kinds[max_seq_length:])
    found: list[Token] = []
    run: list[int] = []
    for index, token_id in enumerate(whole["input_ids"]):
        run.append(token_id)
        text = tokenizer.decode(run)
        ends = index + 1 == len(kinds) or kinds[index + 1] != kinds[index]
        # A character may be spread over up to four tokens; alone each of them is a question mark.
        if "\ufffd" not in text or ends or len(run) == 4:
            found.append(Token(ids=tuple(run), text=text, kind=kinds[index]))
            run = []
    return found


def as_text(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    *,
    options: LabelOptions = DEFAULT,
    colour: bool = False,
) -> str:
    """A sample as text, what is trained on between ⟦ and ⟧; with colour for a terminal.

    In colour the tail that is cut at max_seq_length is shown struck through; without, it is counted.
    """
    found = tokens(conversation, tokenizer, max_seq_length, options)
    cut = sum(len(token.ids) for token in found if token.kind == "cut")
    text, kind = "", "prompt"
    run: list[int] = []

    def flush() -> str:
        shown = tokenizer.decode(run) if run else ""
        run.clear()
        if not colour:
            return "" if kind == "cut" else shown
        return _TERMINAL[kind] + shown + "\x1b[0m" if shown else ""

    for token in [*found, None]:
        new = token.kind if token else "prompt"
        if new != kind or token is None:
            text += flush() + ("⟧" if kind == "trained" else "") + ("⟦" if new == "trained" else "")
            kind = new
        if token:
            run.extend(token.ids)
    return text + (f"\n… {cut} tokens are cut at max_seq_length = {max_seq_length}" if cut else "")


def as_html(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    *,
    options: LabelOptions = DEFAULT,
) -> str:
    """A sample as HTML: a span a token with its ids on hover; trained ones coloured, underlined and in ⟦ ⟧."""
    found = tokens(conversation, tokenizer, max_seq_length, options)
    trained = sum(len(token.ids) for token in found if token.kind == "trained")
    cut = sum(len(token.ids) for token in found if token.kind == "cut")
    parts, kind = [], "prompt"
    for token in [*found[:_SHOWN_TOKENS], None]:
        new = token.kind if token else "prompt"
        if new != kind:
            parts.append(("⟧" if kind == "trained" else "") + ("⟦" if new == "trained" else ""))
            kind = new
        if token:
            ids = " ".join(map(str, token.ids))
            title = f"{ids} · {token.kind}"
            shown = html.escape(token.text).replace("\n", "↵<br>")
            parts.append(f'<span style="{_STYLE[kind]}" title="{title}">{shown}</span>')
    total = sum(len(token.ids) for token in found)
    note = f"{html.escape(conversation.source)}: {total} tokens, {trained} trained on ⟦ ⟧"
    note += f", {cut} cut at max_seq_length = {max_seq_length} (struck through)" if cut else ""
    note += f"; the first {_SHOWN_TOKENS:,} are shown" if len(found) > _SHOWN_TOKENS else ""
    body = "".join(parts)
    return f'<div style="font-family:monospace;line-height:1.7"><div>{note}</div><div>{body}</div></div>'
