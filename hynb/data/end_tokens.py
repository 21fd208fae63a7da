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


def end_token(
    tails: Iterable[str], tokens: re.Pattern[str], special: Collection[str], preferred: Sequence[str]
) -> str | None:
    """The text of the token that ends an answer; None if none does.

    Args:
        tails: texts that begin with the answer, of which any may have its end.
        tokens: pattern of the added tokens' texts, special ones included.
        special: texts of the special ones.
        preferred: tokens that end other answers. Tags of thoughts and tool calls come before them.
    """
    runs = [run for tail in tails if (run := trailing_tokens(tail, tokens))]
    for text in preferred:
        if any(match[0] == text and match.start() > 0 for run in runs for match in run):
            return text
    for run in runs:
        if run[0].start() == 0:
            continue
        texts = [match[0] for match in run]
        # A tag that is part of the text closes something inside of the answer.
        named = [text for text in texts if text in special] or [text for text in texts if not is_closing_tag(text)]
        if named:
            return named[-1]
    return None


def is_closing_tag(text: str) -> bool:
    """Whether a token is a tag such as `</think>`."""
    return text.startswith(("</", "[/"))


def end_of(tail: str, tokens: re.Pattern[str], ends: Collection[str]) -> int | None:
    """The position behind the end token of an answer with which a text begins; None if it has none."""
    ending = itertools.dropwhile(lambda match: match[0] not in ends, trailing_tokens(tail, tokens))
    found = [match.end() for match in itertools.takewhile(lambda match: match[0] in ends, ending)]
    return found[-1] if found else None
