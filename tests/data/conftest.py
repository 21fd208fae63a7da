"""A tokenizer for all tests of data, and a cache of their own."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

import hynb.hunyuan_large  # noqa: F401  registers the tokenizer
from hynb.demo.pretrain import write_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, vocab_size=700, samples=500)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)
