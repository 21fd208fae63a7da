"""A base model that the tests of the merge share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_model, with_code
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A bf16 model in several shards, with the other files that a released model folder has."""
    folder = tmp_path_factory.mktemp("merge") / "base"
    tiny_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return with_code(folder)
