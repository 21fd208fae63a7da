"""Hunyuan-Large in plain, slow PyTorch: the reference for the fast model.

It takes a checkpoint's own key names. Order in attention: project, RoPE, norm of each head, attention. A layer
without its own K and V takes the projections of an earlier layer, before RoPE and norm. Top-1 routing scales by the
raw probability, top-k by the probabilities renormalised over the k, if `norm_topk_prob` is not false; probabilities
that are not renormalised have a factor.
"""

from __future__ import annotations

import torch


def of_layer(value, index):
    return value[index] if isinstance(value, (list, tuple)) else value


def rms_norm(x, weight, eps):
    wide = x.float()
    return (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)


def rope(x, config):
    """Rotates x (heads × length × head_dim): each element of the first half with one of the second."""
    dim = x.shape[-1]
    base = config["rope_theta"]
    scaling = config.get("rope_scaling")
    if scaling and scaling.get("alpha"):
        base = base * scaling["alpha"] ** (dim / (dim - 2))
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2).float() / dim)
    angles = torch.arange(x.shape[1]).float()[:, None] * frequencies[None]
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], -1) * sin


def mlp(x, weights, name):
    gate, up, down = (weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def linear(x, weights, name):
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def moe(x, weights, name, config, index):
    """Output (length × hidden) of x (length × hidden), computed token by token."""
    topk = of_layer(config["moe_topk"], index)
    probabilities = torch.softmax(x.float() @ weights[f"{name}.gate.wg.weight"].T.float(), -1)
    rows = []
    for token, row in zip(x, probabilities, strict=True):
        values, experts = row.topk(topk)
        if topk > 1 and config.get("norm_topk_prob", True):
            values = values / values.sum()
        else:
            values = values * config.get("routed_scaling_factor", 1.0)
        routed = sum(
            value * mlp(token, weights, f"{name}.experts.{expert}")
            for value, expert in zip(values, experts.tolist(), strict=True)
        )
        rows.append(routed)
    routed = torch.stack(rows)
    return mlp(x, weights, f"{name}.shared_mlp") + routed if config["use_mixed_mlp_moe"] else routed


def logits(weights, config, ids):
    """Logits (length × vocabulary) of one sequence of ids without padding."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("attention_head_dim") or config["hidden_size"] // heads
    eps = config["rms_norm_eps"]
    x = weights["model.embed_tokens.weight"][ids]
    length = len(ids)
    mask = torch.full((length, length), float("-inf")).triu(1)
    key = value = None
    for index in range(config["num_hidden_layers"]):
        name = f"model.layers.{index}"
        h = rms_norm(x, weights[f"{name}.input_layernorm.weight"], eps)
        attention = f"{name}.self_attn"
        if not config["use_cla"] or index % config["cla_share_factor"] == 0:
            key, value = linear(h, weights, f"{attention}.k_proj"), linear(h, weights, f"{attention}.v_proj")
        q = rope(linear(h, weights, f"{attention}.q_proj").view(length, heads, dim).transpose(0, 1), config)
        k = rope(key.view(length, kv_heads, dim).transpose(0, 1), config)
        v = value.view(length, kv_heads, dim).transpose(0, 1)
        if config["use_qk_norm"]:
            q = rms_norm(q, weights[f"{attention}.query_layernorm.weight"], eps)
            k = rms_norm(k, weights[f"{attention}.key_layernorm.weight"], eps)
        k, v = (states.repeat_interleave(heads // kv_heads, dim=0) for states in (k, v))
        scores = torch.softmax((q @ k.transpose(1, 2)) / dim**0.5 + mask, -1)
        x = x + linear((scores @ v).transpose(0, 1).reshape(length, -1), weights, f"{attention}.o_proj")
        h = rms_norm(x, weights[f"{name}.post_attention_layernorm.weight"], eps)
        dense = of_layer(config["num_experts"], index) == 1 or index < config.get("moe_layer_num_skipped", 0)
        x = x + (mlp(h, weights, f"{name}.mlp") if dense else moe(h, weights, f"{name}.mlp", config, index))
    x = rms_norm(x, weights["model.norm.weight"], eps)
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return x @ weights[head].T
