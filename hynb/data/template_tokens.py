"""What a chat template takes of a tokenizer: the texts of its special and added tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol


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
