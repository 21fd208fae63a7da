"""Full checkpoints: written by all ranks together, bit for bit what transformers would have gathered and written."""

from __future__ import annotations

import json
import re
import socket

import pytest
import torch
from adapters import load_tensors
from training_runs import FAMILIES, config_of
from transformers import AutoModelForCausalLM

from hynb.config import to_yaml
from hynb.launch import attach
from hynb.train import ByteProgress, plan_shards
from hynb.train.checkpoint import base_tensors


@pytest.mark.parametrize("preset", ["ds_zero2_no_offload", "ds_zero3_offload"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_are_those_that_transformers_saves(family, preset, files, ranks, tmp_path):
    values = {"deepspeed": preset, "max_steps": 2, "save_steps": 2, "bf16": family != "hunyuan"}
    run = ranks.train(config_of(files, family, tmp_path / "run", **values), before="training_runs:save_in_both_ways")
    ours, theirs = load_tensors(run.checkpoints()[-1]), load_tensors(tmp_path / "run" / "by_transformers")
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert ours[name].dtype == weight.dtype and torch.equal(ours[name], weight), name
    before = load_tensors(files[family])
    assert not all(torch.equal(ours[name], weight) for name, weight in before.items())


def test_a_random_model_is_saved_and_loads(files, ranks, tmp_path):
    sizes = {"num_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    values = {"model_name_or_path": None, "tokenizer_name_or_path": str(files["hunyuan"]), "max_steps": 1}
    run = ranks.train(
        config_of(files, "hunyuan", tmp_path / "run", **values, **sizes, save_steps=1, deepspeed="ds_zero3_offload"),
        before="training_runs:save_in_both_ways",
    )
    ours, theirs = load_tensors(run.checkpoints()[-1]), load_tensors(tmp_path / "run" / "by_transformers")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((run.checkpoints()[-1] / "config.json").read_text())["architectures"]


def test_files_of_a_model_without_a_base_are_divided_by_size(files, monkeypatch):
    monkeypatch.setattr("hynb.train.saving._SHARD_BYTES", 40_000)
    model = AutoModelForCausalLM.from_pretrained(files["hy_v3"])
    shards = plan_shards(model, [], [], dtype=torch.float32, has_index=False)
    assert len(shards) > 2 and shards[1].file == f"model-00002-of-{len(shards):05}.safetensors"
    sizes = [[tensor.size_bytes for tensor in shard.tensors] for shard in shards]
    assert all(sum(group) <= 40_000 or len(group) == 1 for group in sizes)
    names = [tensor.name for shard in shards for tensor in shard.tensors]
    assert sorted(names) == sorted(entry.name for entry in base_tensors(files["hy_v3"]))


def test_a_rank_that_cannot_write_is_named(files, ranks, tmp_path):
    config = config_of(files, "hunyuan_v1_dense", tmp_path / "run", max_steps=1, deepspeed="ds_zero3_offload")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    done = ranks.run(tmp_path / "run.yaml", ranks=2, before="training_runs:fill_disk_of_rank_1")
    assert done.returncode == 2
    host = re.escape(socket.gethostname())
    assert re.search(
        rf"checkpoint-1: the checkpoint cannot be written by rank 1 on {host}: .*No space left", done.stderr
    )
    assert "Traceback" not in done.stderr
    assert not attach(tmp_path / "run").checkpoints()


def test_progress_is_shown_for_all_ranks_together():
    shown: list[str] = []
    progress = ByteProgress("saving", factor=8, show=shown.append)
    progress(10**9, 4 * 10**9)
    assert not shown, "less than a second has passed"
    progress(4 * 10**9, 4 * 10**9)
    assert shown[0].startswith("32 of 32 GB, ") and shown[0].endswith(" GB/s")
