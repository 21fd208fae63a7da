"""The sizes of Hunyuan-Large, from its config.json."""

from __future__ import annotations

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
