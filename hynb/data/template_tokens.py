"""What a chat template takes of a tokenizer: the texts of its special and added tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from hynb.data.contents import THOUGHT
from hynb.data.placeholders import BREAK


class TemplateTokenizer(Protocol):
    """What a chat template takes of a tokenizer, named as in transformers."""

    @property
    def special_tokens_map(self) -> Mapping[str, Any]:
        """Texts of the special tokens that have names, such as eos_token."""
        ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Tokens beside the vocabulary by their ids, with `content` and `special`."""
        ...

    @property
    def all_special_tokens(self) -> Sequence[str]:
        """Texts of all special tokens that have names."""
        ...


def token_texts(tokenizer: TemplateTokenizer, *, special_only: bool) -> frozenset[str]:
    """The texts of special tokens, or of all added tokens.

    Args:
        special_only: leave out added tokens that are part of the text, such as `<think>` in some tokenizers.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special or not special_only]
    return frozenset(str(name) for name in [*tokenizer.all_special_tokens, *added] if name)


def pattern_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of the texts, the longest first; nothing if there is none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def answer_tags(special_texts: Iterable[str], sought: Iterable[str]) -> frozenset[str]:
    """Special tokens that are an answer's form: those around a thought, and those that its template looks for."""
    sought = list(sought)
    return frozenset(
        text
        for text in special_texts
        if THOUGHT.match(text.replace("</", "<", 1)) or any(text in other for other in sought)
    )


def broken_texts(value: Any, special: re.Pattern[str], keep: frozenset[str] = frozenset()) -> Any:
    """A value with a `BREAK` inside each special token that a text in it spells.

    Args:
        special: finds special tokens.
        keep: those that stay whole.
    """
    if isinstance(value, str):
        if not special.search(value):
            return value
        return special.sub(lambda match: match[0] if match[0] in keep else match[0][0] + BREAK + match[0][1:], value)
    if isinstance(value, Mapping):
        return {broken_texts(key, special): broken_texts(item, special) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [broken_texts(item, special) for item in value]
    return value
