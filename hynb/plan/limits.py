"""How far ZeRO-3 gathers weights ahead and how much it reduces at once, from the model and from the GPUs' memory.

DeepSpeed 0.19.8 (deepspeed/runtime/zero/partitioned_param_coordinator.py) gathers the next tensors while a module
computes, as long as fewer than `stage3_prefetch_bucket_size` elements are under way and fewer than
`stage3_max_live_parameters` are gathered; the last tensor may exceed either by its own size. transformers derives the
former from hidden_size alone, and the latter's default, 1e9, is less than the experts of one large layer.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from hynb.families import ModelConfig
from hynb.files import size_text
from hynb.plan import memory, zero

# DeepSpeed's default of `stage3_max_live_parameters`, which small models keep.
_DEFAULT_LIVE = 1_000_000_000
# Transfers of fewer elements are bound by latency; more than DeepSpeed's default brings nothing.
_MIN_REDUCED, _MAX_REDUCED = 50_000_000, 500_000_000
# Share of a GPU's memory for the buffer of gradients.
_BUFFER_SHARE = 0.02
# Share of a GPU's memory that a plan may use.
_USABLE_SHARE = 0.95


@dataclass(kw_only=True, frozen=True)
class Limits:
    """Values of a DeepSpeed config, in elements, with their reason.

    Args:
        max_live: `stage3_max_live_parameters`.
        prefetch: `stage3_prefetch_bucket_size`.
        reduced: `reduce_bucket_size`.
    """

    max_live: int
    prefetch: int
    reduced: int
    reason: str


def limits_of(model_config: ModelConfig, workload: memory.Workload, *, preset: str, gpu_bytes: int | None) -> Limits:
    """The limits of a ZeRO-3 preset for a model.

    Args:
        model_config: the content of its config.json.
        gpu_bytes: memory of the smallest GPU; None where it is unknown, or on a CPU.

    Raises:
        ModelError: as `memory.count_parameters`.
    """
    count = memory.count_parameters(model_config)
    layer, tensor = max(item.total for item in count.layers), max(count.matrices)
    size = f"the largest layer has {layer:.3g} parameters, its largest tensor {tensor:.3g}"
    room = None
    if gpu_bytes is not None:
        parts = memory.estimate(model_config, workload, preset=preset).parts
        others = sum(parts.values()) - parts["gathered layers"]
        room = max(0, int((gpu_bytes * _USABLE_SHARE - others) / workload.weight_bytes))
    # A prefetch may exceed the limit by one tensor.
    if room is None or room >= 2 * layer + tensor:
        wanted = 2 * layer
        if room is None or room >= _DEFAULT_LIVE + tensor:
            wanted = max(wanted, _DEFAULT_LIVE)
        max_live, prefetch = wanted, layer
        reason = f"{size}: the next layer is gathered while one computes"
    elif room >= 2 * layer:
        max_live, prefetch = 2 * layer - tensor, layer
        reason = f"{size}: GPU memory has room for two layers and no more"
    else:
        max_live = prefetch = max(0, room - tensor)
        reason = f"{size}: GPU memory has no room for two layers, so that little is gathered ahead"
    if gpu_bytes is not None:
        reason += f"; each GPU has {size_text(gpu_bytes)}"
    return Limits(max_live=max_live, prefetch=prefetch, reduced=_reduced(count, workload, gpu_bytes), reason=reason)


def with_limits(ds_config: dict[str, Any], limits: Limits) -> tuple[dict[str, Any], str]:
    """A copy of a preset's DeepSpeed config with these limits, and a note on them."""
    ds_config = copy.deepcopy(ds_config)
    values = {
        "stage3_max_live_parameters": limits.max_live,
        "stage3_prefetch_bucket_size": limits.prefetch,
        "reduce_bucket_size": limits.reduced,
    }
    ds_config["zero_optimization"] |= values
    return ds_config, ", ".join(f"{name} = {value:.3g}" for name, value in values.items()) + f": {limits.reason}"


def are_derived(preset: zero.Preset) -> bool:
    """Whether a run derives the limits: under ZeRO-3, unless the preset fixes them."""
    return preset.stage == 3 and preset.bucket_elements is None


def _reduced(count: memory.ParameterCount, workload: memory.Workload, gpu_bytes: int | None) -> int:
    """What one layer trains without its experts, whose tensors are reduced one by one in any case."""
    if workload.use_lora:
        trained = memory.adapter_size(count, workload)
        of_layer = trained // len(count.layers)
    elif workload.train_attention_params_only:
        trained, of_layer = count.attention, max(layer.attention for layer in count.layers)
    else:
        of_experts = (layer.experts if layer.router else 0 for layer in count.layers)
        trained = count.total
        of_layer = max(layer.total - experts for layer, experts in zip(count.layers, of_experts, strict=True))
    most = min(_MAX_REDUCED, trained)
    if gpu_bytes is not None:
        most = min(most, int(gpu_bytes * _BUFFER_SHARE / workload.weight_bytes))
    return max(1, min(max(of_layer, _MIN_REDUCED), most))
