"""Parameter counts against real models, and estimates against what was published."""

from __future__ import annotations

import pytest
import torch
from tiny import OF_FAMILY, SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from hynb.errors import ModelError
from hynb.plan.memory import compare, count_parameters, describe, estimate
from hynb.plan.zero import PRESETS

LARGE = {
    "model_type": "hunyuan",
    "hidden_size": 6400,
    "intermediate_size": 18304,
    "num_hidden_layers": 64,
    "num_attention_heads": 80,
    "num_key_value_heads": 8,
    "num_experts": 16,
    "moe_topk": 1,
    "use_cla": True,
    "cla_share_factor": 2,
    "use_mixed_mlp_moe": True,
    "num_shared_expert": 1,
    "use_qk_norm": True,
    "tie_word_embeddings": True,
    "vocab_size": 129024,
}
VARIANTS = [
    *((name, {}) for name in OF_FAMILY),
    ("hunyuan", {"tie_word_embeddings": False, "attention_bias": True}),
    ("hunyuan", {"num_experts": 1}),
    ("hunyuan", {"use_mixed_mlp_moe": False, "use_qk_norm": False, "use_cla": False}),
    ("hunyuan", {"num_shared_expert": [1, 2, 1, 2], "cla_share_factor": 3}),
    ("hy_v3", {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"], "num_shared_experts": 2}),
]


@pytest.mark.parametrize(("family", "sizes"), VARIANTS)
def test_counts_equal_a_real_models(family, sizes):
    config = AutoConfig.for_model(family, vocab_size=100, **(SIZES | OF_FAMILY[family] | sizes))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = count_parameters(config.to_dict())
    assert counted.total == sum(weight.numel() for weight in model.parameters())
    attention = sum(weight.numel() for name, weight in model.named_parameters() if ".self_attn." in name)
    assert counted.attention == attention


def test_hunyuan_large_has_its_published_size():
    count = count_parameters(LARGE)
    assert count.total / 1e9 == pytest.approx(389, rel=0.005)
    assert 2 * count.total / 1e9 == pytest.approx(777, rel=0.005)
    assert count.layers[0].moe_block / 1e9 == pytest.approx(5.97, rel=0.01)
    assert count.lora(64, ("q_proj", "k_proj", "v_proj", "o_proj")) / 1e6 == pytest.approx(134, rel=0.01)


@pytest.mark.parametrize(("use_lora", "gpus", "fits"), [(True, 8, True), (False, 32, True)])
def test_the_published_needs_fit_their_96_gb(use_lora, gpus, fits):
    plan = estimate(
        LARGE, preset="ds_zero3_offload", world_size=gpus, gpus_per_host=8, use_lora=use_lora, max_seq_length=2048
    )
    assert (plan.gpu_bytes < 96e9) is fits, describe(plan)
    without = estimate(LARGE, preset="ds_zero2_no_offload", world_size=gpus, gpus_per_host=8, use_lora=use_lora)
    assert without.gpu_bytes > 777e9, "ZeRO-2 holds all weights on each GPU"


def test_presets_fall_in_gpu_memory_and_parts_add_up():
    plans = compare(LARGE, world_size=8, gpus_per_host=8, use_lora=True)
    assert [plan.preset.name for plan in plans] == list(PRESETS)
    sizes = [plan.gpu_bytes for plan in plans]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    for plan in plans:
        assert sum(plan.parts.values()) == plan.gpu_bytes
        assert plan.preset.title in describe(plan)
    assert plans[2].host_bytes > 777e9 > plans[1].host_bytes


def test_a_leaf_costs_a_whole_moe_block():
    values = {"preset": "ds_zero3_offload", "world_size": 8, "gpus_per_host": 8, "use_lora": True}
    leaf = estimate(LARGE, make_moe_param_leaf_module=True, **values)
    assert leaf.gpu_bytes > estimate(LARGE, **values).gpu_bytes


def test_an_adapters_checkpoint_is_small_and_a_full_one_is_not():
    values = {"preset": "ds_zero3_offload", "world_size": 8, "gpus_per_host": 8}
    assert estimate(LARGE, use_lora=True, **values).disk_bytes < 4e9
    assert estimate(LARGE, **values).disk_bytes > 5e12


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {"model_type": "hunyuan"}, {}])
def test_other_models_are_refused(config):
    with pytest.raises(ModelError):
        count_parameters(config)
