"""The sizes of a random model, which is trained where no base model is given."""

from __future__ import annotations

from typing import Any

from hynb.config.schema import Config
from hynb.families import FAMILIES, Family, RandomModel


def random_model_config(config: Config) -> dict[str, Any]:
    """The content of the random model's config.json, as far as a Config decides it: no vocabulary, no token ids."""
    family, random_model = _chosen_family(config)
    return {
        "model_type": family.model_type,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads or config.num_attention_heads,
        "num_experts": config.num_experts,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": max(2048, config.max_seq_length),
        **random_model.fields(config.values()),
    }


def _chosen_family(config: Config) -> tuple[Family, RandomModel]:
    """The family whose own parameters are given, otherwise the one that needs none."""
    values = config.values()
    found = [(family, family.random_model) for family in FAMILIES.values() if family.random_model]
    return next(
        ((family, item) for family, item in found if any(values[name] is not None for name in item.chosen_by)),
        next((family, item) for family, item in found if not item.chosen_by),
    )
