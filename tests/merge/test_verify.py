"""What a merged folder is checked for after it was written."""

from __future__ import annotations

import shutil

import pytest
import torch
from adapters import load_tensors, make_adapter
from safetensors.torch import load_file, save_file

from hynb.errors import MergeError
from hynb.merge import merge_lora, verify_merge
from hynb.merge.shards import model_shards


@pytest.fixture
def merged(base, tmp_path):
    """A merged folder whose base is a copy that may be changed."""
    own_base = shutil.copytree(base, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    merge_lora(base_model_path=own_base, adapter_model_path=adapter, output_path=tmp_path / "m")
    return tmp_path / "m"


def last_shard(folder):
    return sorted(folder.glob("*.safetensors"))[-1]


def test_every_tensor_is_compared_and_progress_reaches_all_of_them(merged):
    reports = []
    count = verify_merge(merged, progress=lambda done, total: reports.append((done, total)))
    assert count == len(load_tensors(merged))
    assert reports == [(done, count) for done in range(1, count + 1)]


def test_a_changed_byte_is_found(merged):
    shard = last_shard(merged)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(MergeError, match="differs from what base and adapter give"):
        verify_merge(merged)


def test_a_tensor_that_does_not_belong_to_the_base_is_found(merged):
    index, shard = merged / "model.safetensors.index.json", last_shard(merged)
    weights = load_file(shard)
    save_file(weights | {"more.weight": torch.zeros(3)}, shard, metadata={"format": "pt"})
    index.write_text(index.read_text().replace('"weight_map": {', f'"weight_map": {{"more.weight": "{shard.name}",'))
    with pytest.raises(MergeError, match=r"tensor more\.weight does not belong to the base"):
        verify_merge(merged)


def test_a_base_that_has_changed_since_is_named(merged, tmp_path):
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(MergeError, match="the base has changed since"):
        verify_merge(merged)


def test_a_folder_that_no_merge_wrote_is_named(base):
    with pytest.raises(MergeError, match=r"has no merge_receipt\.json, so it was not written by hynb merge"):
        verify_merge(base)


@pytest.mark.parametrize("save_dtype", ["keep", "fp16"])
@pytest.mark.parametrize("kind", ["q_proj", "k_proj"])
def test_a_bit_of_a_changed_and_of_an_unchanged_tensor_is_found(base, tmp_path, kind, save_dtype):
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    merge_lora(base_model_path=base, adapter_model_path=adapter, output_path=tmp_path / "m", save_dtype=save_dtype)
    verify_merge(tmp_path / "m")
    entry = next(entry for shard in model_shards(tmp_path / "m") for entry in shard.tensors if kind in entry.name)
    content = bytearray(entry.shard.read_bytes())
    content[(entry.begin + entry.end) // 2] ^= 1
    entry.shard.write_bytes(content)
    with pytest.raises(MergeError, match=rf"tensor {entry.name} differs from what base and adapter give"):
        verify_merge(tmp_path / "m")
