"""The token that ends an answer, found in the text that a chat template writes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Sequence

from hynb.errors import DataError


class NoEndTokenError(DataError):
    """An answer that the chat template ends with no end token."""


def trailing_tokens(text: str, tokens: re.Pattern[str]) -> list[re.Match[str]]:
    """The tokens at the end of a text, with nothing but white space between and behind them."""
    run: list[re.Match[str]] = []
    for match in tokens.finditer(text):
        if run and text[run[-1].end() : match.start()].strip():
            run = []
        run.append(match)
    return run if run and not text[run[-1].end() :].strip() else []


def end_token(tails: Iterable[str], tokens: re.Pattern[str], known: Sequence[str], eos: str | None) -> str | None:
    """The text of the token that ends an answer; None if none does.

    Args:
        tails: texts that begin with the answer, of which any may have its end.
        tokens: pattern of the added tokens' texts, special ones included.
        known: tokens that end other answers. What stands before them, such as the tags of tool calls, ends nothing.
        eos: the tokenizer's end token.
    """
    runs = [run for tail in tails if (run := trailing_tokens(tail, tokens)) and run[0].start() > 0]
    for run in runs:
        texts = [match[0] for match in run]
        # The token that ends answers comes before one that only ends the text.
        of_others = [text for text in known if text in texts] or [text for text in texts if known and text == eos]
        candidates = of_others or [text for text in texts if text == eos or not _is_tag(text, tokens)]
        if candidates:
            return candidates[0]
    return None


def _is_tag(text: str, tokens: re.Pattern[str]) -> bool:
    """Whether a token is a tag such as `</think>`, or `<think>` where that closes it."""
    if text.startswith(("</", "[/")):
        return True
    return text[:1] in ("<", "[") and tokens.fullmatch(f"{text[0]}/{text[1:]}") is not None


def end_of(tail: str, tokens: re.Pattern[str], ends: Collection[str]) -> int | None:
    """The position behind the end token of an answer with which a text begins; None if it has none."""
    ending = itertools.dropwhile(lambda match: match[0] not in ends, trailing_tokens(tail, tokens))
    found = [match.end() for match in itertools.takewhile(lambda match: match[0] in ends, ending)]
    return found[-1] if found else None
