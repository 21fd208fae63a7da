"""Loads a tokenizer from a folder, or says what is missing there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hynb.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One of them holds the vocabulary.
_VOCABULARIES = ("tokenizer.json", "*.tiktoken", "*.model", "vocab.*", "tekken.json")


def missing_tokenizer_files(folder: Path) -> str:
    """Which files a folder lacks to load its tokenizer, and what to do; empty if it lacks none."""
    missing = [] if (folder / "tokenizer_config.json").is_file() else ["tokenizer_config.json"]
    if not _has_vocabulary(folder):
        missing.append("tokenizer.json (or hy.tiktoken)")
    if not missing:
        return ""
    return f"MISSING: {', '.join(missing)}; copy the tokenizer's files of the model into {folder}"


def load_tokenizer_folder(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder.

    Args:
        trust_remote_code: run Python files of the folder.

    Raises:
        ModelError: there is no such folder, files are missing, or the tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    import hynb.hunyuan_large  # noqa: F401  registers its tokenizer

    if not folder.is_dir():
        raise ModelError(f"{folder}: there is no such folder")
    missing = missing_tokenizer_files(folder)
    # Without a vocabulary transformers (5.23) may make an empty tokenizer, or asks for a folder of the same name.
    if missing and not (_has_vocabulary(folder) or trust_remote_code):
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {missing}")
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
        # transformers (5.23) takes any, and fails where a text is tokenised.
        if not isinstance(tokenizer.model_max_length, (int, float)):
            raise ValueError(f"model_max_length = {str(tokenizer.model_max_length)[:80]}: must be a number")
        return tokenizer
    except Exception as error:
        # Damaged files raise exceptions of many kinds; those of the tokenizers library are plain Exceptions.
        reason = missing or " ".join(str(error).split())
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {reason}") from error


def _has_vocabulary(folder: Path) -> bool:
    return any(path.is_file() for pattern in _VOCABULARIES for path in folder.glob(pattern))
