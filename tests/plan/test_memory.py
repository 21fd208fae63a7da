"""Parameter counts against real models, and estimates against the published requirements."""

from __future__ import annotations

import json

import pytest
import torch
from large_model import LARGE
from peft import LoraConfig, get_peft_model
from tiny import OF_FAMILY, SIZES
from transformers import AutoConfig, AutoModelForCausalLM

import hynb.hunyuan_large  # noqa: F401  registers the model with the Auto classes
from hynb.errors import ModelError
from hynb.plan.memory import MemoryPlan, Workload, compare, count_parameters, cpu_bytes, estimate, pinned_bytes
from hynb.plan.zero import PRESETS

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


ADAPTERS = [
    (("q_proj", "k_proj", "v_proj", "o_proj"), False),
    (("self_attn.q_proj", "gate_proj", "up_proj", "down_proj", "wg", "lm_head"), False),
    (("v_proj", "down_proj"), True),
]


@pytest.mark.parametrize(("targets", "on_experts"), ADAPTERS)
@pytest.mark.parametrize(("family", "sizes"), VARIANTS)
def test_adapters_are_those_of_peft(family, sizes, targets, on_experts):
    config = AutoConfig.for_model(family, vocab_size=100, **(SIZES | OF_FAMILY[family] | sizes))
    model = model_on_meta(config)
    fused = {name.partition(".mlp.")[2] for name, _ in model.named_parameters() if ".mlp.experts." in name}
    present = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    chosen = [name for name in targets if name.rpartition(".")[2] in present]
    settings = LoraConfig(r=3, target_modules=chosen, target_parameters=sorted(fused) if on_experts else None)
    with torch.device("meta"):
        adapted = get_peft_model(model, settings)
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert count_parameters(config.to_dict()).lora(3, targets, on_experts=on_experts) == trained


def test_the_loss_takes_pieces_of_the_logits():
    """32k tokens: with whole logits in float32, its gradient and a bfloat16 copy it would be 42 GB."""
    long = estimated("ds_zero3_offload", use_lora=True, max_seq_length=32768).parts["loss"]
    assert long < 3e9
    twice = estimated("ds_zero3_offload", use_lora=True, max_seq_length=65536).parts["loss"]
    assert twice - long == 2 * 32768 * LARGE["hidden_size"] * 2, "hidden states and their gradients alone grow"
    assert estimated("ds_zero3_offload", max_seq_length=32768).parts["loss"] > long + LARGE["vocab_size"] * 6400
    on_head = estimated("ds_zero3_offload", use_lora=True, max_seq_length=32768, lora_target_modules=("lm_head",))
    assert on_head.parts["loss"] == 32768 * LARGE["vocab_size"] * 10


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
    # What is trained is copied into one buffer; the optimizer has its gradients in float32 too.
    more = {"weights": 2 * count // 16, "gradients": 4 * count // 16, "optimizer": 0}
    for part, size_bytes in per_gpu.items():
        expected = 8 * (size_bytes + more[part]) if part in in_host_memory else 0
        assert plan.host_parts[part] == pytest.approx(expected, abs=1000), part
    assert plan.host_parts["processes"] == 8 * (6 << 30)
    assert (plan.host_parts["rounding of pinned memory"] > 0) is bool(in_host_memory)
    assert sum(plan.host_parts.values()) == plan.host_bytes


@pytest.mark.parametrize("name", PRESETS)
def test_without_gpus_all_is_in_host_memory(name):
    """Full fine-tuning on two hosts of 8 ranks; weights whole in each rank under ZeRO-1 and 2, else once."""
    work = Workload(world_size=16, gpus_per_host=8, weight_bytes=4)
    found = cpu_bytes(estimate(LARGE, work, preset=name), work.gpus_per_host)
    count, weights = count_parameters(LARGE).total, 4 * (8 if PRESETS[name].stage != 3 else 0.5)
    # 16 bytes of gradient and optimizer for each parameter, of which each host has half.
    least = (weights + 16 / 2) * count
    assert least <= found <= 1.4 * least + 8e9


@pytest.mark.parametrize(("ranks", "gigabytes"), [(8, 825), (24, 1237)])
def test_experts_in_pinned_memory_are_rounded_up_to_powers_of_two(ranks, gigabytes):
    """720 GB of experts: on 8 ranks each part of 937 MB takes 1 GiB, on 24 each of 312 MB takes 512 MiB."""
    sizes = [size for layer in count_parameters(LARGE).layers for size in layer.expert_tensors]
    assert 2 * sum(sizes) / 1e9 == pytest.approx(720, abs=0.5)
    pinned = ranks * sum(pinned_bytes(2 * -(-size // ranks)) for size in sizes)
    assert round(pinned / 1e9) == gigabytes
    plan = estimated("ds_zero3_param_offload", world_size=ranks, use_lora=True)
    rounding = plan.host_parts["rounding of pinned memory"] * ranks // 8
    # The other weights are rounded too.
    assert pinned - 2 * sum(sizes) < rounding < pinned - 2 * sum(sizes) + 60e9


@pytest.mark.parametrize(
    ("size", "allocated"), [(1, 1), (4096, 4096), (4097, 8192), ((1 << 30) - 1, 1 << 30), ((1 << 30) + 1, 1 << 31)]
)
def test_pinned_memory_is_allocated_in_powers_of_two(size, allocated):
    assert pinned_bytes(size) == allocated


@pytest.mark.parametrize(("family", "sizes"), VARIANTS)
def test_the_matrices_are_those_of_a_model(family, sizes):
    config = AutoConfig.for_model(family, vocab_size=100, **(SIZES | OF_FAMILY[family] | sizes))
    model = model_on_meta(config)
    expected = sorted(weight.numel() for weight in model.parameters() if weight.dim() > 1)
    found = sorted(count_parameters(config.to_dict()).matrices)
    # The biases of a Hy3 MLP are counted with its matrices.
    assert found == expected or (sizes.get("mlp_bias") and len(found) == len(expected))


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


def test_gpus_that_share_a_sequence_share_its_activations():
    whole = estimated("ds_zero3_offload", max_seq_length=1 << 16)
    shared = estimated("ds_zero3_offload", max_seq_length=1 << 16, sequence_parallel_size=8)
    assert shared.parts["activations"] == whole.parts["activations"] / 8
    assert shared.parts["gathered layers"] == whole.parts["gathered layers"]


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
