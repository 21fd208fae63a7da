"""The supported model families: one entry each, with everything in which they differ."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hynb.errors import ModelError

ModelConfig = Mapping[str, Any]
"""The content of a config.json."""


@dataclass(kw_only=True, frozen=True)
class MlpSize:
    """The size of one layer's MLP.

    Args:
        router: parameters of the router.
        experts: parameters of the routed experts together, or of a dense layer's MLP.
        shared: parameters of the shared MLP.
        active_width: intermediate width that each token passes through: of its experts and the shared MLP together.
        expert_count, expert_width: number of routed experts, and the intermediate width of each; 0 without.
        linear_width: intermediate width of the dense layer's or the shared MLP, whose projections are modules; 0
            without.
    """

    router: int = 0
    experts: int
    shared: int = 0
    active_width: int
    expert_count: int = 0
    expert_width: int = 0
    linear_width: int


@dataclass(kw_only=True, frozen=True)
class RandomModel:
    """How a random model of a family gets its config.json.

    Args:
        fields: what the family adds to the sizes that all have, from the values of a run's parameters.
        chosen_by: parameters that only this family has: a random model is of this family where one of them is given.
            Empty for the family of all other random models.
        note: what a user has to know of it.
    """

    fields: Callable[[Mapping[str, Any]], dict[str, Any]]
    chosen_by: tuple[str, ...] = ()
    note: str = ""


@dataclass(kw_only=True, frozen=True)
class Family:
    """A model family whose code is part of hynb or transformers; code inside a model folder is never needed.

    Args:
        model_type: as in config.json.
        moe_block: module and class of the MoE block, which ZeRO-3 gathers whole when it is marked as a leaf;
            None for a dense family.
        router: module and class of the router, whose output is logits (tokens × experts), and weights and ids
            (tokens × top-k) of the chosen experts; None for a dense family.
        linear_router: the last part of the name of the linear module in the router; empty where it has none.
        moves_mlp_adapters: PEFT (0.21, utils/transformers_weight_conversion.py) puts adapters that are meant for the
            projections of the MLPs on the routed experts, and none on the shared MLP.
        sigmoid_router: the router scores each expert by a sigmoid instead of by a softmax over all of them.
        cross_layer_attention: layers may share K and V (`use_cla`, `cla_share_factor`; arXiv 2405.12981).
        qk_norm: whether queries and keys are normalised if config.json has no `use_qk_norm`.
        mlp_size: the size of one layer's MLP, from config.json and the layer's index.
        mtp_layers: the field of config.json with the number of MTP layers (multi-token prediction, arXiv 2404.19737),
            which are stored after the others. transformers does not load them; None for a family without.
        stored_names: parts of parameter names that transformers changes when it loads a model, as pairs of the part
            in the model and the part in weight files.
        random_model: how a random model gets its config.json; None where a run cannot train one.
    """

    model_type: str
    moe_block: tuple[str, str] | None = None
    router: tuple[str, str] | None = None
    linear_router: str = ""
    moves_mlp_adapters: bool = False
    sigmoid_router: bool = False
    cross_layer_attention: bool = False
    qk_norm: bool = True
    mlp_size: Callable[[ModelConfig, int], MlpSize]
    mtp_layers: str | None = None
    stored_names: tuple[tuple[str, str], ...] = ()
    random_model: RandomModel | None = None

    def moe_block_class(self) -> type | None:
        """The class of the MoE block; imports torch and the model's module."""
        return _load(self.moe_block)

    def router_class(self) -> type | None:
        """The class of the router; imports torch and the model's module."""
        return _load(self.router)

    def stored_name(self, name: str) -> str:
        """The name that a parameter or a module of the model has in weight files; fused experts keep their name."""
        for in_model, in_file in self.stored_names:
            name = f"{name}.".replace(f".{in_model}.", f".{in_file}.")[:-1]
        return name

    def mtp_count(self, model_config: ModelConfig) -> int:
        """The number of MTP layers."""
        return (model_config.get(self.mtp_layers) or 0) if self.mtp_layers else 0

    def is_mtp_tensor(self, name: str, model_config: ModelConfig) -> bool:
        """Whether a tensor of a weight file belongs to an MTP layer."""
        count = self.mtp_count(model_config)
        first = model_config["num_hidden_layers"]
        found = re.match(r"model\.layers\.(\d+)\.", name)
        return found is not None and first <= int(found[1]) < first + count


def chooses_experts(name: str) -> bool:
    """Whether a tensor of a weight file is a router's weight, or the bias by which hy_v3 chooses experts."""
    return re.search(r"\.gate\.(wg\.)?weight$|\.expert_bias$", name) is not None


def family_of(model_type: str | None) -> Family:
    """The family of a config.json's `model_type`.

    Raises:
        ModelError: hynb does not support this model type.
    """
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ModelError(f"model_type = {model_type}: not supported; hynb supports {', '.join(FAMILIES)}")
    return family


def _load(location: tuple[str, str] | None) -> type | None:
    return getattr(importlib.import_module(location[0]), location[1]) if location else None


def _of_layer(value: Any, index: int) -> int:
    """A layer's value of a config field that may be a list with one entry per layer; 0 if it is missing."""
    return (value[index] if isinstance(value, list) else value) or 0


def _gated_mlp(hidden_size: int, width: int, bias: bool = False) -> int:
    """Parameters of the gate, up and down projections."""
    return 3 * hidden_size * width + (2 * width + hidden_size if bias else 0)


def _dense_mlp(model_config: ModelConfig, index: int) -> MlpSize:
    width = _of_layer(model_config["intermediate_size"], index)
    return MlpSize(experts=_gated_mlp(model_config["hidden_size"], width), active_width=width, linear_width=width)


def _moe_mlp(
    hidden_size: int, width: int, *, experts: int, top_k: int, shared: int, shared_bias: bool = False
) -> MlpSize:
    """A layer of `experts` routed experts of one width and a shared MLP that is `shared` times as wide."""
    return MlpSize(
        router=hidden_size * experts,
        experts=_gated_mlp(hidden_size, width) * experts,
        shared=_gated_mlp(hidden_size, width * shared, shared_bias) if shared else 0,
        active_width=width * (top_k + shared),
        expert_count=experts,
        expert_width=width,
        linear_width=width * shared,
    )


def _hunyuan_mlp(model_config: ModelConfig, index: int) -> MlpSize:
    experts = _of_layer(model_config.get("num_experts"), index) or 1
    if experts == 1 or index < (model_config.get("moe_layer_num_skipped") or 0):
        return _dense_mlp(model_config, index)
    width = model_config.get("moe_intermediate_size") or model_config["intermediate_size"]
    shared = _of_layer(model_config.get("num_shared_expert", 1), index)
    return _moe_mlp(
        model_config["hidden_size"],
        _of_layer(width, index),
        experts=experts,
        top_k=_of_layer(model_config.get("moe_topk"), index) or 1,
        shared=shared if model_config.get("use_mixed_mlp_moe") else 0,
    )


def _v1_moe_mlp(model_config: ModelConfig, index: int) -> MlpSize:
    return _moe_mlp(
        model_config["hidden_size"],
        _of_layer(model_config["intermediate_size"], index),
        experts=_of_layer(model_config.get("num_experts"), index) or 1,
        top_k=_of_layer(model_config.get("moe_topk"), index) or 1,
        shared=1,
    )


def _hy_v3_mlp(model_config: ModelConfig, index: int) -> MlpSize:
    hidden_size, bias = model_config["hidden_size"], bool(model_config.get("mlp_bias"))
    layer_types = model_config.get("mlp_layer_types")
    if (layer_types[index] if layer_types else ("dense" if index == 0 else "sparse")) == "dense":
        width = model_config["intermediate_size"]
        return MlpSize(experts=_gated_mlp(hidden_size, width, bias), active_width=width, linear_width=width)
    return _moe_mlp(
        hidden_size,
        model_config["moe_intermediate_size"],
        experts=model_config.get("num_experts") or 1,
        top_k=model_config.get("num_experts_per_tok") or 1,
        shared=model_config.get("num_shared_experts") or 0,
        shared_bias=bias,
    )


def _random_hunyuan(values: Mapping[str, Any]) -> dict[str, Any]:
    names = ("moe_topk", "use_cla", "cla_share_factor", "use_mixed_mlp_moe", "num_shared_expert", "use_qk_norm")
    rope_scaling = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}
    return {name: values[name] for name in names} | {"rope_scaling": rope_scaling}


def _random_hy_v3(values: Mapping[str, Any]) -> dict[str, Any]:
    # transformers' own number of dense layers is 1.
    dense = 1 if values["moe_layer_num_skipped"] is None else values["moe_layer_num_skipped"]
    return {
        # Of every published Hy3 model, and transformers' default; upstream's script has no flag for it.
        "head_dim": 128,
        "moe_intermediate_size": values["moe_intermediate_size"] or values["intermediate_size"],
        "num_experts_per_tok": values["moe_topk"],
        "num_shared_experts": values["num_shared_expert"] if values["use_mixed_mlp_moe"] else 0,
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (values["num_layers"] - dense),
    }


_V1_MOE = "transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe"
_HY_V3 = "transformers.models.hy_v3.modeling_hy_v3"
_ENTRIES = (
    # Hunyuan-Large, and Hunyuan-A13B's older folders: fields of config.json make the difference.
    Family(
        model_type="hunyuan",
        moe_block=("hynb.hunyuan_large", "HunYuanLargeMoE"),
        router=("hynb.hunyuan_large.modeling", "HunYuanLargeGate"),
        linear_router="wg",
        cross_layer_attention=True,
        qk_norm=False,
        mlp_size=_hunyuan_mlp,
        random_model=RandomModel(fields=_random_hunyuan),
    ),
    Family(
        model_type="hunyuan_v1_moe",
        moe_block=(_V1_MOE, "HunYuanMoEV1Moe"),
        router=(_V1_MOE, "HunYuanMoEV1Gate"),
        linear_router="wg",
        moves_mlp_adapters=True,
        mlp_size=_v1_moe_mlp,
    ),
    Family(model_type="hunyuan_v1_dense", mlp_size=_dense_mlp),
    Family(
        model_type="hy_v3",
        moe_block=(_HY_V3, "HYV3MoE"),
        router=(_HY_V3, "HYV3TopKRouter"),
        sigmoid_router=True,
        mlp_size=_hy_v3_mlp,
        mtp_layers="num_nextn_predict_layers",
        stored_names=(
            ("mlp.gate", "mlp.router.gate"),
            ("mlp.e_score_correction_bias", "mlp.expert_bias"),
            ("mlp.shared_experts", "mlp.shared_mlp"),
        ),
        random_model=RandomModel(
            fields=_random_hy_v3,
            chosen_by=("moe_intermediate_size", "moe_layer_num_skipped"),
            note="its queries and keys are normalised whatever use_qk_norm is",
        ),
    ),
)
FAMILIES = {entry.model_type: entry for entry in _ENTRIES}
