"""A base of `.bin` files: read as plain tensors, merged as the same base in safetensors."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from adapters import ATTENTION, load_tensors, make_adapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hynb.errors import MergeError
from hynb.merge import find_merge, merge_lora, verify_merge
from hynb.runs import BASE_IDENTITY, base_identity


@pytest.fixture
def pickled(base, tmp_path):
    """The base with a `.bin` file in place of each safetensors file."""
    folder = shutil.copytree(base, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors*"))
    for number, path in enumerate(sorted(base.glob("*.safetensors")), 1):
        torch.save(load_file(path), folder / f"pytorch_model-{number:05d}-of-00009.bin")
    return folder


def test_a_pickled_base_merges_as_the_same_base_in_safetensors(base, pickled, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=ATTENTION)
    merge_lora(base_model_path=base, adapter_model_path=adapter, output_path=tmp_path / "a")
    (adapter / BASE_IDENTITY).write_text(json.dumps(base_identity(pickled)))
    merge_lora(base_model_path=pickled, adapter_model_path=adapter, output_path=tmp_path / "b")
    left, right = load_tensors(tmp_path / "a"), load_tensors(tmp_path / "b")
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert verify_merge(tmp_path / "b") == len(left)
    assert not list((tmp_path / "b").glob("*.bin")) and not list(tmp_path.glob(".b*"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    inputs = {"base_model_path": pickled, "adapter_model_path": adapter, "output_path": tmp_path / "b"}
    assert find_merge(**inputs, save_dtype="keep") is not None


def test_code_in_a_pickle_is_not_run(base, pickled, tmp_path):
    class Code:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/run",))

    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    torch.save({"model.norm.weight": Code()}, sorted(pickled.glob("*.bin"))[0])
    with pytest.raises(MergeError, match=r"00001-of-00009\.bin: cannot be read as plain tensors"):
        merge_lora(base_model_path=pickled, adapter_model_path=adapter, output_path=tmp_path / "c")
    assert not (tmp_path / "run").exists() and not (tmp_path / "c").exists()
