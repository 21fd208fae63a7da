"""Hunyuan-Large's tokenizer as a fast one, converted from `hy.tiktoken` once and cached."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Numbers are split into single digits, as upstream's tokenizer does; the rest is common to tiktoken vocabularies.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>"),
    *(f"<|extra_{number}|>" for number in range(204)),
)
_NAMED_TOKENS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
# To be raised with every change of the conversion, so that no older result is read from the cache.
_CACHE_VERSION = "1"


class HYTokenizer(PreTrainedTokenizerFast):
    """The tokenizer of a folder with `hy.tiktoken`, or with the `tokenizer.json` that saving it writes.

    Its eos_token is `<|endoftext|>`, as upstream's, although a chat turn ends with `<|eos|>`.
    """

    vocab_files_names = {"vocab_file": "hy.tiktoken", "tokenizer_file": "tokenizer.json"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    # No __init__: transformers would then rebuild a saved tokenizer from its vocabulary alone.
    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """What transformers builds the tokenizer from: `tokenizer.json` if it exists, else `hy.tiktoken`."""
        vocab_file = kwargs.pop("vocab_file", None)
        saved = kwargs.get("tokenizer_file")
        if not (saved and Path(saved).is_file()) and vocab_file is not None:
            # A file if possible: transformers copies an object, which takes longer than reading a file.
            cache = convert_cached(Path(vocab_file))
            if cache:
                kwargs["tokenizer_file"] = str(cache)
            else:
                kwargs["tokenizer_object"] = convert(Path(vocab_file).read_bytes())
        for name, token in _NAMED_TOKENS.items():
            if kwargs.get(name) is None:
                kwargs[name] = token
        return kwargs


def convert_cached(vocab_file: Path) -> Path | None:
    """The `tokenizer.json` of a vocabulary, converted once per content; None if the cache cannot be written."""
    content = vocab_file.read_bytes()
    name = hashlib.sha256(content + _CACHE_VERSION.encode()).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hynb" / "tokenizers" / f"{name}.json"
    if cache.is_file():
        return cache
    try:
        cache.parents[1].mkdir(mode=0o700, parents=True, exist_ok=True)
        cache.parent.mkdir(exist_ok=True)
        unfinished = cache.with_suffix(f".{os.getpid()}")
        convert(content).save(str(unfinished), pretty=False)
        unfinished.replace(cache)
    except OSError:
        return None
    return cache


def convert(content: bytes) -> Tokenizer:
    """A tiktoken vocabulary as a fast tokenizer.

    Args:
        content: one line per token, with its bytes in base64 and its rank.
    """
    ranks = {
        base64.b64decode(token): int(rank)
        for token, rank in (line.split() for line in content.splitlines() if line.strip())
    }
    characters = bytes_to_unicode()

    def as_text(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [
            (ranks[left], ranks[right], left, right) for left, right in halves if left in ranks and right in ranks
        ]
        # tiktoken merges any pair that forms the token, the pair of lowest ranks first.
        merges += [(rank, as_text(left), as_text(right)) for _, _, left, right in sorted(known)]
    merges.sort(key=lambda merge: merge[0])
    vocabulary = {as_text(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [(left, right) for _, left, right in merges], fuse_unk=False, ignore_merges=True)
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer
