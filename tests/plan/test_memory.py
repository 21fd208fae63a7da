"""Parameter counts against real models, and estimates against the published requirements."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import OF_FAMILY, SIZES
from transformers import AutoConfig, AutoModelForCausalLM

import hynb.hunyuan_large  # noqa: F401  registers the model with the Auto classes
from hynb.errors import ModelError
from hynb.plan.memory import MemoryPlan, Workload, compare, count_parameters, estimate
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
    ("hunyuan", {"num_shared_expert": [1, 2, 1, 2], "moe_topk": [1, 2, 1, 2], "cla_share_factor": 3}),
    ("hunyuan", {"moe_intermediate_size": [16, 24, 8, 40], "moe_layer_num_skipped": 2, "moe_topk": [2, 2, 2, 2]}),
    ("hunyuan", {"head_dim": None, "attention_head_dim": 12}),
    ("hy_v3", {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"], "num_shared_experts": 2}),
    ("hy_v3", {"mlp_bias": True, "attention_bias": True}),
]


def model_on_meta(config) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("family", "sizes"), VARIANTS)
def test_counts_equal_those_of_a_model(family, sizes):
    config = AutoConfig.for_model(family, vocab_size=100, **(SIZES | OF_FAMILY[family] | sizes))
    model = model_on_meta(config)
    counted = count_parameters(config.to_dict())
    assert counted.total == sum(weight.numel() for weight in model.parameters())
    attention = sum(weight.numel() for name, weight in model.named_parameters() if ".self_attn." in name)
    assert counted.attention == attention


@pytest.mark.parametrize(
    ("folder", "billions"),
    [("hunyuan-4b", 4), ("hunyuan-7b", 7), ("hunyuan-a13b", 80), ("hy3", 295)],
)
def test_counts_of_published_config_files(shared, folder, billions):
    """About what the model is named after, and exactly what the model has that transformers builds."""
    path = shared / "models" / folder
    model_config = json.loads((path / "config.json").read_text())
    counted = count_parameters(model_config)
    assert counted.total / 1e9 == pytest.approx(billions, rel=0.1)
    assert counted.total == sum(
        weight.numel() for weight in model_on_meta(AutoConfig.from_pretrained(path)).parameters()
    )
    for plan in compare(model_config, Workload(world_size=8, gpus_per_host=8)):
        assert plan.gpu_bytes > 0


def test_hunyuan_large_has_its_published_size():
    count = count_parameters(LARGE)
    assert count.total / 1e9 == pytest.approx(389, rel=0.005)
    assert 2 * count.total / 1e9 == pytest.approx(777, rel=0.005)
    assert count.layers[0].moe_block / 1e9 == pytest.approx(5.97, rel=0.01)
    assert count.lora(64, ("q_proj", "k_proj", "v_proj", "o_proj")) / 1e6 == pytest.approx(134, rel=0.01)


def estimated(preset: str, *, world_size: int = 8, **choices) -> MemoryPlan:
    return estimate(LARGE, Workload(world_size=world_size, gpus_per_host=8, **choices), preset=preset)


@pytest.mark.parametrize(("use_lora", "gpus"), [(True, 8), (False, 32)])
def test_the_published_requirements_fit_gpus_of_96_gb(use_lora, gpus):
    plan = estimated("ds_zero3_offload", world_size=gpus, use_lora=use_lora)
    assert plan.gpu_bytes < 96e9, plan
    without = estimated("ds_zero2_no_offload", world_size=gpus, use_lora=use_lora)
    assert without.gpu_bytes > 777e9, "ZeRO-2 holds all weights on each GPU"


def test_presets_decrease_in_gpu_memory_and_parts_add_up():
    plans = compare(LARGE, Workload(world_size=8, gpus_per_host=8, use_lora=True))
    assert [plan.preset.name for plan in plans] == list(PRESETS)
    sizes = [plan.gpu_bytes for plan in plans]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(PRESETS)
    for plan in plans:
        assert sum(plan.parts.values()) == plan.gpu_bytes
    assert {plan.preset.name for plan in plans if plan.host_bytes > 777e9} == {
        "ds_zero3_param_offload",
        "ds_zero3_offload",
    }


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_moves_to_host_memory_is_not_on_the_gpus(name):
    """Full fine-tuning on 16 GPUs of two hosts: 2 bytes per weight and gradient, 12 of the optimizer."""
    plan, preset, count = estimated(name, world_size=16), PRESETS[name], count_parameters(LARGE).total
    per_gpu = {"weights": 2 * count, "gradients": 2 * count // 16, "optimizer": 12 * count // 16}
    if preset.stage == 3:
        per_gpu["weights"] //= 16
    in_host_memory = {"weights"} if preset.offload_param else set()
    in_host_memory |= {"gradients", "optimizer"} if preset.offload_optimizer else set()
    for part, size_bytes in per_gpu.items():
        assert plan.parts[part] == (0 if part in in_host_memory else size_bytes), part
    processes_bytes = 8 * (6 << 30)
    offloaded_bytes = 8 * sum(per_gpu[part] for part in in_host_memory)
    assert plan.host_bytes - processes_bytes == pytest.approx(offloaded_bytes, abs=100)


def test_full_fine_tuning_swaps_the_presets_that_offload_one_part():
    """The README and the help of the presets say so."""

    def order(**choices) -> bool:
        return (
            estimated("ds_zero3_optimizer_offload", **choices).gpu_bytes
            > estimated("ds_zero3_param_offload", **choices).gpu_bytes
        )

    assert order(use_lora=True) and not order()


def test_a_leaf_costs_a_whole_moe_block_under_zero_3_alone():
    def extra_bytes(preset: str) -> int:
        leaf = estimated(preset, use_lora=True, make_moe_param_leaf_module=True)
        return leaf.gpu_bytes - estimated(preset, use_lora=True).gpu_bytes

    assert extra_bytes("ds_zero3_offload") > 0
    assert extra_bytes("ds_zero2_no_offload") == 0


def test_activations_grow_with_the_experts_of_a_token():
    def activations(**choices) -> int:
        workload = Workload(world_size=8, gpus_per_host=8, gradient_checkpointing=False)
        return estimate(LARGE | choices, workload, preset="ds_zero3_offload").parts["activations"]

    # gate, up and product of one more expert, in bf16, for 2048 tokens in each of 64 layers.
    assert activations(moe_topk=2) - activations() == 64 * 2048 * 4 * 18304 * 2
    assert activations(num_shared_expert=2) == activations(moe_topk=2)
    assert activations(use_mixed_mlp_moe=False) == activations() - 64 * 2048 * 4 * 18304 * 2


def test_the_checkpoint_of_an_adapter_is_small_and_a_full_one_is_not():
    assert estimated("ds_zero3_offload", use_lora=True).disk_bytes < 4e9
    assert estimated("ds_zero3_offload").disk_bytes > 5e12


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "model_type = llama: not supported; hynb supports hunyuan, "),
        ({}, "model_type = None: not supported"),
        ({"model_type": "hunyuan"}, "config.json of hunyuan: a size is missing or invalid: 'hidden_size'"),
        (LARGE | {"moe_topk": [1]}, "config.json of hunyuan: a size is missing or invalid"),
    ],
)
def test_other_models_are_refused(config, message):
    with pytest.raises(ModelError) as caught:
        count_parameters(config)
    assert str(caught.value).startswith(message)
