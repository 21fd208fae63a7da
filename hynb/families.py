"""The supported model families, one entry each: everything that differs between them stands here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hynb.errors import ModelError

ModelConfig = Mapping[str, Any]


@dataclass(kw_only=True, frozen=True)
class MlpCount:
    """Parameters of one layer's router, routed experts (or its one dense MLP), and shared MLP."""

    router: int = 0
    experts: int
    shared: int = 0


@dataclass(kw_only=True, frozen=True)
class Family:
    """A model family, whose code is in hynb or in transformers: code inside a model folder is never needed.

    Args:
        model_type: as config.json has it.
        moe_block: module and class of the MoE block, which ZeRO-3 gathers whole when it is marked as a leaf;
            None for a dense family.
        router: module and class of the router, which returns logits (tokens × experts), weights and ids of the
            chosen experts; None for a dense family.
        sigmoid_router: the router scores each expert by itself instead of by a softmax over all.
        cross_layer_attention: layers may share K and V (`use_cla`, `cla_share_factor`).
        qk_norm: the default of `use_qk_norm`.
        mlp: parameters of one layer's MLP, from config.json's content and the layer's index.
    """

    model_type: str
    moe_block: tuple[str, str] | None = None
    router: tuple[str, str] | None = None
    sigmoid_router: bool = False
    cross_layer_attention: bool = False
    qk_norm: bool = True
    mlp: Callable[[ModelConfig, int], MlpCount]

    def moe_block_class(self) -> type | None:
        """The class of the MoE block; imports the model's module, and torch with it."""
        return _load(self.moe_block)

    def router_class(self) -> type | None:
        """The class of the router; imports the model's module, and torch with it."""
        return _load(self.router)


def of_layer(value: Any, index: int) -> Any:
    """The value for one layer of a config field that may be a list with one entry per layer."""
    return value[index] if isinstance(value, list) else value


def family_of(model_type: str | None) -> Family:
    """The family of a config.json's `model_type`.

    Raises:
        ModelError: hynb does not support the model type.
    """
    family = FAMILIES.get(model_type or "")
    if family is None:
        raise ModelError(f"model_type = {model_type}: not supported; hynb knows {', '.join(FAMILIES)}")
    return family


def _load(place: tuple[str, str] | None) -> type | None:
    return getattr(importlib.import_module(place[0]), place[1]) if place else None


def _dense_mlp(model_config: ModelConfig, index: int) -> MlpCount:
    return MlpCount(experts=3 * model_config["hidden_size"] * of_layer(model_config["intermediate_size"], index))


def _hunyuan_large_mlp(model_config: ModelConfig, index: int) -> MlpCount:
    one = _dense_mlp(model_config, index).experts
    experts = of_layer(model_config.get("num_experts") or 1, index)
    if experts == 1:
        return MlpCount(experts=one)
    width = of_layer(model_config.get("num_shared_expert", 1), index)
    shared = one * width if model_config.get("use_mixed_mlp_moe") else 0
    return MlpCount(router=model_config["hidden_size"] * experts, experts=one * experts, shared=shared)


def _v1_moe_mlp(model_config: ModelConfig, index: int) -> MlpCount:
    one = _dense_mlp(model_config, index).experts
    experts = of_layer(model_config.get("num_experts") or 1, index)
    return MlpCount(router=model_config["hidden_size"] * experts, experts=one * experts, shared=one)


def _hy_v3_mlp(model_config: ModelConfig, index: int) -> MlpCount:
    hidden = model_config["hidden_size"]
    kinds = model_config.get("mlp_layer_types")
    if (kinds[index] if kinds else ("dense" if index == 0 else "sparse")) == "dense":
        bias = 2 * model_config["intermediate_size"] + hidden if model_config.get("mlp_bias") else 0
        return MlpCount(experts=_dense_mlp(model_config, index).experts + bias)
    experts = of_layer(model_config.get("num_experts") or 1, index)
    expert = 3 * hidden * model_config["moe_intermediate_size"]
    shared = expert * (model_config.get("num_shared_experts") or 0)
    return MlpCount(router=hidden * experts, experts=expert * experts, shared=shared)


_V1_MOE = "transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe"
_HY_V3 = "transformers.models.hy_v3.modeling_hy_v3"
_ENTRIES = (
    Family(
        model_type="hunyuan",
        moe_block=("hynb.hunyuan_large", "HunYuanLargeMoE"),
        router=("hynb.hunyuan_large.modeling", "HunYuanLargeGate"),
        cross_layer_attention=True,
        qk_norm=False,
        mlp=_hunyuan_large_mlp,
    ),
    Family(
        model_type="hunyuan_v1_moe",
        moe_block=(_V1_MOE, "HunYuanMoEV1Moe"),
        router=(_V1_MOE, "HunYuanMoEV1Gate"),
        mlp=_v1_moe_mlp,
    ),
    Family(model_type="hunyuan_v1_dense", mlp=_dense_mlp),
    Family(
        model_type="hy_v3",
        moe_block=(_HY_V3, "HYV3MoE"),
        router=(_HY_V3, "HYV3TopKRouter"),
        sigmoid_router=True,
        mlp=_hy_v3_mlp,
    ),
)
FAMILIES = {entry.model_type: entry for entry in _ENTRIES}
