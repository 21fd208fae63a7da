"""The sizes of a random model, which is trained where no base model is given."""

from __future__ import annotations

from typing import Any

from hynb.config.schema import Config

# Of every published Hy3 model, and transformers' default; upstream's script has no flag for it.
_HY3_HEAD_DIM = 128


def random_model_config(config: Config) -> dict[str, Any]:
    """The content of the random model's config.json, as far as a Config decides it: no vocabulary, no token ids.

    It is a Hy3 where `moe_intermediate_size` or `moe_layer_num_skipped` is given, which only upstream's script of Hy3
    knows; otherwise a Hunyuan-Large.
    """
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads or config.num_attention_heads,
        "num_experts": config.num_experts,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": max(2048, config.max_seq_length),
    }
    if config.moe_intermediate_size is None and config.moe_layer_num_skipped is None:
        names = ("moe_topk", "use_cla", "cla_share_factor", "use_mixed_mlp_moe", "num_shared_expert", "use_qk_norm")
        rope_scaling = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}
        of_large = {name: getattr(config, name) for name in names}
        return {"model_type": "hunyuan"} | sizes | of_large | {"rope_scaling": rope_scaling}
    # transformers' own number of dense layers is 1.
    dense = 1 if config.moe_layer_num_skipped is None else config.moe_layer_num_skipped
    return {
        "model_type": "hy_v3",
        **sizes,
        "head_dim": _HY3_HEAD_DIM,
        "moe_intermediate_size": config.moe_intermediate_size or config.intermediate_size,
        "num_experts_per_tok": config.moe_topk,
        "num_shared_experts": config.num_shared_expert if config.use_mixed_mlp_moe else 0,
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (config.num_layers - dense),
    }
