"""Routers in float32 beside weights in bf16: rounded logits would send tokens to other experts.

DeepSpeed rounds all parameters to the training's dtype, and leaves buffers as they are (DeepSpeed 0.19.8,
runtime/engine.py `_configure_distributed_model`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from hynb.families import FAMILIES
from hynb.merge import TensorEntry, read_tensor
from hynb.train.router_statistics import routers


class Float32Linear(nn.Linear):
    """A projection that is computed in float32, whatever its input and weight are."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits in float32."""
        bias = self.bias.float() if self.bias is not None else None
        return nn.functional.linear(input.float(), self.weight.float(), bias)


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
