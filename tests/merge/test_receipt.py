"""A merge that exists already is recognised by its receipt."""

from __future__ import annotations

import shutil

import pytest
from adapters import make_adapter

from hynb.errors import MergeError
from hynb.merge import find_merge, merge_lora


@pytest.fixture(scope="module")
def inputs(base, tmp_path_factory):
    """What was merged; the base is a copy of its own."""
    folder = tmp_path_factory.mktemp("receipt")
    own_base = shutil.copytree(base, folder / "base")
    adapter = make_adapter(base, folder / "adapter", target_modules=["q_proj"])
    values = {"base_model_path": own_base, "adapter_model_path": adapter, "output_path": folder / "merged"}
    merge_lora(**values, save_dtype="bf16")
    return values | {"save_dtype": "bf16"}


def test_the_same_merge_is_found(inputs):
    receipt = find_merge(**inputs)
    assert receipt is not None and receipt["tensors_changed"] > 0


def test_a_merge_of_anything_else_is_not_found(inputs, base, tmp_path):
    assert find_merge(**(inputs | {"save_dtype": "keep"})) is None
    assert find_merge(**(inputs | {"output_path": tmp_path})) is None
    other = make_adapter(base, tmp_path / "other", seed=1, target_modules=["q_proj"])
    assert find_merge(**(inputs | {"adapter_model_path": other})) is None
    changed = shutil.copytree(base, tmp_path / "changed")
    (changed / "config.json").write_text((changed / "config.json").read_text() + "\n")
    assert find_merge(**(inputs | {"base_model_path": changed})) is None
    with pytest.raises(MergeError, match="not an adapter folder"):
        find_merge(**(inputs | {"adapter_model_path": tmp_path}))
