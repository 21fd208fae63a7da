"""Tokenizers with the published chat templates, for tests: the models' own vocabularies are not public here."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import hynb.hunyuan_large  # noqa: F401  registers the tokenizer

MODELS = ("hunyuan-large", "hunyuan-a13b", "hunyuan-7b", "hy3")


@functools.cache
def tokenizer_of(model: str, shared: Path) -> PreTrainedTokenizerBase:
    """Hunyuan-Large's vocabulary with another model's special tokens and its chat template, byte for byte."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "hunyuan-large")
    folder = shared / "models" / model
    if model == "hunyuan-a13b":
        tokenizer.chat_template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    elif model != "hunyuan-large":
        tokens = json.loads((folder / "tokens.json").read_text())
        special = [AddedToken(token, special=True, normalized=False) for token in tokens["special_tokens"]]
        tokenizer.add_tokens(special, special_tokens=True)
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens["added_tokens"]])
        for name in ("bos_token", "eos_token", "pad_token"):
            if tokens.get(name):
                setattr(tokenizer, name, tokens[name])
        tokenizer.chat_template = (folder / "chat_template.jinja").read_text()
    return tokenizer


def small_tokenizer_of(model: str, shared: Path, texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """The same special tokens, splitting and template, with a small vocabulary made of texts."""
    full = tokenizer_of(model, shared)
    assert isinstance(full, PreTrainedTokenizerFast)
    small = Tokenizer(models.BPE())
    small.normalizer = full.backend_tokenizer.normalizer
    small.pre_tokenizer = full.backend_tokenizer.pre_tokenizer
    small.decoder = full.backend_tokenizer.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    small.train_from_iterator(texts, trainer)
    # In the order of their ids; the extra tokens that no template writes are left out.
    kept = [
        token
        for _, token in sorted(full.added_tokens_decoder.items())
        if "extra" not in token.content or token.content in ("<|extra_0|>", "<|extra_4|>")
    ]
    small.add_special_tokens([token for token in kept if token.special])
    small.add_tokens([token for token in kept if not token.special])
    names = {name: getattr(full, name) for name in ("bos_token", "eos_token", "pad_token")}
    return PreTrainedTokenizerFast(tokenizer_object=small, chat_template=full.chat_template, **names)
