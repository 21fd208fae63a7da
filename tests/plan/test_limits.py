"""Limits of ZeRO-3 that are derived from a model and the GPUs' memory."""

from __future__ import annotations

import dataclasses

import pytest
from large_model import LARGE

from hynb.plan import limits, memory, zero

LORA = memory.Workload(world_size=8, gpus_per_host=8, use_lora=True)
# One layer of Hunyuan-Large, and the first two matrices of its experts together.
LAYER, TENSOR = 6.05e9, 3.75e9


def found(gpu_gb: float | None, work: memory.Workload = LORA, **changes) -> limits.Limits:
    gpu_bytes = None if gpu_gb is None else int(gpu_gb * 1e9)
    return limits.limits_of(LARGE | changes, work, preset="ds_zero3_param_offload", gpu_bytes=gpu_bytes)


def test_two_layers_where_the_memory_allows():
    for gpu_gb in (None, 96):
        limit = found(gpu_gb)
        assert limit.max_live == 2 * limit.prefetch == pytest.approx(2 * LAYER, rel=0.02)
        assert limit.reason.startswith("the largest layer has 6.06e+09 parameters, its largest tensor 3.75e+09: ")
        assert "the next layer is gathered while one computes" in limit.reason


def test_less_where_it_does_not():
    """Whatever the limits are, what they let DeepSpeed gather fits: one tensor more than the limit."""
    reasons = []
    for gpu_gb in range(16, 97, 2):
        limit = found(gpu_gb)
        others = memory.estimate(LARGE, LORA, preset="ds_zero3_param_offload").parts
        room_bytes = gpu_gb * 1e9 - (sum(others.values()) - others["gathered layers"])
        assert 2 * (limit.max_live + (TENSOR if limit.max_live else 0)) < max(room_bytes, 1), gpu_gb
        reasons.append(limit.reason.split(": ")[1].partition(";")[0])
    assert list(dict.fromkeys(reasons)) == [
        "GPU memory has no room for two layers, so that little is gathered ahead",
        "GPU memory has room for two layers and no more",
        "the next layer is gathered while one computes",
    ]


def test_a_small_model_keeps_deepspeeds_limit_of_gathered_parameters():
    limit = found(24, hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4)
    assert limit.max_live == 10**9 and limit.prefetch < 10**8


@pytest.mark.parametrize(
    ("changes", "reduced"),
    [
        ({"use_lora": True}, 50e6),
        ({"use_lora": True, "lora_rank": 8}, 16.8e6),
        ({"train_attention_params_only": True}, 90.1e6),
        ({}, 441.7e6),
    ],
)
def test_gradients_are_reduced_layer_by_layer(changes, reduced):
    work = dataclasses.replace(LORA, **{"use_lora": False, **changes})
    assert found(None, work).reduced == pytest.approx(reduced, rel=0.01)
    assert found(8, work).reduced == pytest.approx(min(reduced, 80e6), rel=0.01), "2% of the GPU's memory"


def test_which_presets_derive_them():
    assert [name for name, preset in zero.PRESETS.items() if limits.are_derived(preset)] == [
        "ds_zero3_no_offload",
        "ds_zero3_optimizer_offload",
        "ds_zero3_param_offload",
        "ds_zero3_offload",
    ]


def test_the_other_settings_of_a_preset_stay():
    before = zero.build("ds_zero3_offload")
    after, note = limits.with_limits(before, limits.Limits(max_live=3, prefetch=2, reduced=1, reason="because"))
    assert zero.problems(after) == [] and before == zero.build("ds_zero3_offload")
    changed = {key for key, value in after["zero_optimization"].items() if before["zero_optimization"][key] != value}
    assert changed == {"stage3_max_live_parameters", "stage3_prefetch_bucket_size", "reduce_bucket_size"}
    assert note == (
        "stage3_max_live_parameters = 3, stage3_prefetch_bucket_size = 2, reduce_bucket_size = 1: because"
    )
