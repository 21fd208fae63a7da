"""Routers in float32 beside weights in bf16: rounded logits would send tokens to other experts.

DeepSpeed rounds all parameters to the training's dtype, and leaves buffers as they are (DeepSpeed 0.19.8,
runtime/engine.py `_configure_distributed_model`). A router that is not trained becomes a buffer. One that is trained
stays a parameter, so that it is partitioned, reduced and clipped as all others; a buffer beside it has the difference
between the optimizer's float32 weight and that parameter, and their sum is what the router computes with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hynb.families import FAMILIES
from hynb.merge import TensorEntry, read_tensor
from hynb.train.router_statistics import routers

_REST = "float32_rest"


class Float32Linear(nn.Linear):
    """A projection that is computed in float32, whatever its input and weight are."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits in float32."""
        bias = self.bias.float() if self.bias is not None else None
        rest = self._buffers.get(_REST)
        weight = self.weight.float() if rest is None else self.weight.float() + rest
        return nn.functional.linear(input.float(), weight, bias)


def compute_routers_in_float32(model: PreTrainedModel) -> None:
    """Makes every router compute its logits in float32; hy_v3's router does so by itself."""
    for _, router in routers(model, model.config.model_type):
        for module in router.modules():
            if type(module) is nn.Linear:
                module.__class__ = Float32Linear


def keep_frozen_routers(
    model: PreTrainedModel, base: Sequence[TensorEntry], *, adapted: Iterable[str] = ()
) -> list[str]:
    """Gives routers that are not trained the base's float32 weights, which loading has rounded; returns their names.

    They become buffers. Trained routers have their float32 weights in the optimizer, as all that is trained.

    Args:
        base: the tensors of the base.
        adapted: names of modules that get an adapter, and stay as they are.
    """
    family = FAMILIES.get(model.config.model_type)
    entries = {entry.name: entry for entry in base if entry.dtype == "F32"}
    adapted = set(adapted)
    kept = []
    for name, router in routers(model, model.config.model_type):
        for part, weight in list(router.named_parameters()):
            whole = f"{name}.{part}"
            entry = entries.get(family.stored_name(whole) if family else whole)
            path, _, leaf = whole.rpartition(".")
            if entry is None or weight.requires_grad or path.split(".")[-1] in adapted:
                continue
            owner = model.get_submodule(path)
            # Under ZeRO-3 the parameter's own data is empty, on the device of its rank.
            value = read_tensor(entry).to(weight.device)
            delattr(owner, leaf)
            owner.register_buffer(leaf, value)
            kept.append(whole)
    return kept


def optimizer_weights(model: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The optimizer's whole float32 weights of trained parameters, by their names; all ranks call it.

    Without those that have none in memory: under DeepSpeed's offload to NVMe each would be read with its whole group.
    """
    weights = {name: _parameter(model, name) for name in dict.fromkeys(names)}
    weights = {name: weight for name, weight in weights.items() if _has_optimizer_weight(weight)}
    if not weights:
        return {}
    sizes = [getattr(weight, "ds_numel", weight.numel()) for weight in weights.values()]
    first: Any = next(iter(weights.values()))
    # Each element is on one rank, so that the sum over the ranks is exact.
    whole = torch.zeros(sum(sizes), dtype=torch.float32, device=first.device)
    flat = dict(zip(weights, whole.split(sizes), strict=True))
    for name, weight in weights.items():
        begin, part = _own_part(weight)
        target = flat[name][begin : begin + part.numel()]
        target.copy_(part[: target.numel()])
    dist.all_reduce(whole, group=first.ds_process_group if hasattr(first, "ds_id") else first._dp_group)
    return {name: flat[name].view(getattr(weight, "ds_shape", weight.shape)) for name, weight in weights.items()}


class TrainedRouters(TrainerCallback):
    """Keeps routers that are trained in float32: their weights begin with the base's, and they compute with them.

    Args:
        starts: the base's float32 tensors, by names of parameters.
    """

    def __init__(self, model: nn.Module, starts: Mapping[str, TensorEntry]) -> None:
        self._model = model
        self._starts = starts

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Undoes the rounding of the base's weights; those of a resumed run come from its checkpoint."""
        if not state.global_step:
            for name, entry in self._starts.items():
                _set_optimizer_weight(_parameter(self._model, name), read_tensor(entry))
        self._refresh()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Follows the optimizer's step."""
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        for name, value in optimizer_weights(self._model, self._starts).items():
            path, _, leaf = name.rpartition(".")
            if leaf != "weight":
                continue
            owner = self._model.get_submodule(path)
            rest = value - value.to(_parameter(self._model, name).dtype).float()
            if _REST in owner._buffers:
                owner.get_buffer(_REST).copy_(rest)
                continue
            owner.register_buffer(_REST, rest, persistent=False)
            if not isinstance(owner, Float32Linear):
                owner.__class__ = _with_whole_weight(type(owner))


@cache
def _with_whole_weight(router: type[nn.Module]) -> type[nn.Module]:
    """A class of routers that compute in float32 by themselves, and see their weight with its rest."""

    def weight(self: nn.Module) -> torch.Tensor:
        return _parameter(self, "weight").float() + self.get_buffer(_REST)

    return type(router.__name__, (router,), {"weight": property(weight)})


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    path, _, leaf = name.rpartition(".")
    # Not get_parameter, which would find the property of `_with_whole_weight`.
    parameter = model.get_submodule(path)._parameters[leaf]
    assert parameter is not None
    return parameter


def _has_optimizer_weight(weight: Any) -> bool:
    if hasattr(weight, "ds_id"):
        optimizer = getattr(weight, "_z3_optimizer", None)
        return weight.requires_grad and optimizer is not None and not optimizer.swap_optimizer
    return hasattr(weight, "_hp_mapping")


def _own_part(weight: Any) -> tuple[int, torch.Tensor]:
    """This rank's part of the optimizer's weight, and its first element in the whole one."""
    if hasattr(weight, "ds_id"):
        part = deepspeed.utils.safe_get_local_fp32_param(weight)
        return dist.get_rank(weight.ds_process_group) * part.numel(), part.data
    if weight._hp_mapping is None:
        return 0, torch.empty(0)
    return weight._hp_mapping.lp_fragment_address.start, weight._hp_mapping.get_hp_fragment().data


def _set_optimizer_weight(weight: Any, value: torch.Tensor) -> None:
    if not _has_optimizer_weight(weight):
        return
    begin, part = _own_part(weight)
    # The last rank's part under ZeRO-3 may end in padding.
    own = value.reshape(-1)[begin : begin + part.numel()].to(part.device)
    part[: own.numel()].copy_(own)
    if hasattr(weight, "ds_id"):
        deepspeed.utils.safe_set_local_fp32_param(weight, part)
