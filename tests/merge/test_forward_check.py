"""The forward pass through the first layers of a merged model."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from hynb.errors import MergeError
from hynb.merge.forward_check import first_layers_pass


@pytest.mark.parametrize("family", ["hunyuan", "hunyuan_v1_moe", "hunyuan_v1_dense", "hy_v3"])
def test_the_first_layers_load_and_give_finite_logits(family, tmp_path):
    model = tiny_model(tmp_path / "model", family)
    assert first_layers_pass(model) == "forward pass: the first 2 layers load and give finite logits"


def test_logits_that_are_not_finite_and_missing_tensors_are_errors(tmp_path):
    model = tiny_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][3] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match="the first 2 layers give logits that are NaN or infinite"):
        first_layers_pass(model)
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match=r"tensors are missing or have the wrong shape: .*q_proj"):
        first_layers_pass(model)


def test_a_model_without_enough_memory_or_of_another_kind_is_passed_over(tmp_path):
    model = tiny_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_size": 1 << 20, "intermediate_size": 1 << 20}))
    assert first_layers_pass(model).startswith("no forward pass: 2 layers need ")
    (model / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert first_layers_pass(model).startswith("no forward pass: model_type = llama")
