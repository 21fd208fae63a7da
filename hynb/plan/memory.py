"""Memory that a run takes on each GPU, each host and the disk, from a model's config.json alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hynb.errors import ModelError
from hynb.families import Family, family_of, of_layer
from hynb.plan.zero import PRESETS, Preset

# Mixed precision Adam (arXiv 1910.02054, section 3.1): a float32 copy of each trained weight and two moments.
_OPTIMIZER_BYTES = 12
# What CUDA, NCCL and the allocator's gaps were seen to take beside the tensors.
_CONTEXT_BYTES = 3 << 30
_FRAGMENTATION = 0.08
_BUCKET_ELEMENTS = 500_000_000


@dataclass(kw_only=True, frozen=True)
class LayerCount:
    """Parameters of one decoder layer by part, and the shapes (out, in) of its attention's projections."""

    attention: int
    router: int
    experts: int
    shared: int
    norms: int
    projections: dict[str, tuple[int, int]]

    @property
    def total(self) -> int:
        """All of the layer."""
        return self.attention + self.router + self.experts + self.shared + self.norms

    @property
    def moe_block(self) -> int:
        """Router, experts and shared MLP: what ZeRO-3 gathers at once when the block is a leaf."""
        return self.router + self.experts + self.shared


@dataclass(kw_only=True, frozen=True)
class ParameterCount:
    """A model's parameters."""

    layers: tuple[LayerCount, ...]
    embeddings: int
    lm_head: int
    final_norm: int

    @property
    def total(self) -> int:
        """All of the model; a tied output layer counts once."""
        return sum(layer.total for layer in self.layers) + self.embeddings + self.lm_head + self.final_norm

    @property
    def attention(self) -> int:
        """What `train_attention_params_only` trains: the `self_attn` modules, head norms included."""
        return sum(layer.attention for layer in self.layers)

    def lora(self, rank: int, targets: tuple[str, ...]) -> int:
        """Parameters of an adapter on those of the attention's projections that are named."""
        return sum(
            rank * (out + width)
            for layer in self.layers
            for name, (out, width) in layer.projections.items()
            if name in targets
        )


@dataclass(kw_only=True, frozen=True)
class MemoryPlan:
    """What one way of training takes.

    gpu_bytes: of each GPU; host_bytes: of each host; disk_bytes: of each checkpoint.
    parts: gpu_bytes by what they hold.
    """

    preset: Preset
    gpu_bytes: int
    host_bytes: int
    disk_bytes: int
    parts: dict[str, int] = field(default_factory=dict)
    reason: str = ""


def count_parameters(model_config: dict[str, Any]) -> ParameterCount:
    """Parameters of a model of the Hunyuan families, from its config.json.

    Raises:
        ModelError: for another family, or a config without the sizes.
    """
    family = family_of(model_config.get("model_type"))
    try:
        hidden, vocab = model_config["hidden_size"], model_config["vocab_size"]
        layers = tuple(_layer(model_config, family, index) for index in range(model_config["num_hidden_layers"]))
    except (KeyError, TypeError, IndexError) as error:
        raise ModelError(f"config.json of {family.model_type}: a size is missing or invalid: {error}") from None
    tied = model_config.get("tie_word_embeddings", False)
    return ParameterCount(
        layers=layers, embeddings=vocab * hidden, lm_head=0 if tied else vocab * hidden, final_norm=hidden
    )


def estimate(
    model_config: dict[str, Any],
    *,
    preset: str,
    world_size: int,
    gpus_per_host: int,
    use_lora: bool = False,
    lora_rank: int = 64,
    lora_target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    train_attention_params_only: bool = False,
    micro_batch_size: int = 1,
    max_seq_length: int = 2048,
    gradient_checkpointing: bool = True,
    make_moe_param_leaf_module: bool = False,
    weight_bytes: int = 2,
) -> MemoryPlan:
    """What a run takes, spread as the preset spreads it (ZeRO: arXiv 1910.02054, offload: 2101.06840).

    Args:
        weight_bytes: of one weight in training: 2 for bf16 and fp16, 4 for float32.
    """
    chosen, count = PRESETS[preset], count_parameters(model_config)
    adapter = count.lora(lora_rank, tuple(lora_target_modules)) if use_lora else 0
    trained = adapter or (count.attention if train_attention_params_only else count.total)
    weights = (count.total + adapter) * weight_bytes
    gradients, optimizer = trained * weight_bytes, trained * _OPTIMIZER_BYTES
    spread_weights = weights // world_size if chosen.stage == 3 else weights
    largest = _largest_gathered(count, make_moe_param_leaf_module) * weight_bytes
    small_buffers = preset.endswith("no_auto")
    bucket = min(trained, 1_000_000 if small_buffers else _BUCKET_ELEMENTS) * weight_bytes
    tokens = micro_batch_size * max_seq_length
    parts = {
        "weights": 0 if chosen.offload else spread_weights,
        "gradients": gradients // world_size,
        "optimizer": 0 if chosen.offload else optimizer // world_size,
        "buckets": bucket,
        "gathered layers": largest * (1 if small_buffers else 2) if chosen.stage == 3 else 0,
        "activations": _activation_bytes(model_config, count, tokens, weight_bytes, gradient_checkpointing),
        # Logits and their gradient in float32, and the logits in the model's own dtype.
        "logits": tokens * model_config["vocab_size"] * (8 + weight_bytes),
    }
    parts["gaps"] = int(sum(parts.values()) * _FRAGMENTATION)
    parts["CUDA"] = _CONTEXT_BYTES
    on_host = (weights + optimizer + gradients) // world_size * gpus_per_host if chosen.offload else 0
    # Every process has its own Python, and reads shards of the checkpoint when it begins.
    host = on_host + gpus_per_host * (6 << 30)
    saved = adapter or count.total
    disk = saved * weight_bytes * 2 + trained * _OPTIMIZER_BYTES
    return MemoryPlan(
        preset=chosen,
        gpu_bytes=sum(parts.values()),
        host_bytes=host,
        disk_bytes=disk,
        parts=parts,
        reason=(
            f"{count.total / 1e9:.4g}B parameters, {trained / 1e9:.4g}B of them trained, on {world_size} GPUs: "
            f"{chosen.help}"
        ),
    )


def compare(model_config: dict[str, Any], **choices: Any) -> list[MemoryPlan]:
    """The same run under each preset, in the presets' order; arguments as `estimate` takes them."""
    return [
        estimate(
            model_config,
            preset=name,
            # A leaf is a thing of ZeRO-3 alone.
            **(choices | ({"make_moe_param_leaf_module": False} if item.stage != 3 else {})),
        )
        for name, item in PRESETS.items()
    ]


def describe(plan: MemoryPlan) -> str:
    """A plan in a few lines."""
    lines = [
        f"{plan.preset.title} ({plan.preset.name}): {plan.gpu_bytes / 1e9:.1f} GB on each GPU, "
        f"{plan.host_bytes / 1e9:.1f} GB on each host, {plan.disk_bytes / 1e9:.3g} GB a checkpoint",
        plan.reason,
    ]
    lines += [f"  {name}: {size / 1e9:.2f} GB" for name, size in plan.parts.items()]
    return "\n".join(lines)


def _layer(model_config: dict[str, Any], family: Family, index: int) -> LayerCount:
    hidden, heads = model_config["hidden_size"], model_config["num_attention_heads"]
    kv_heads = model_config.get("num_key_value_heads") or heads
    head_dim = model_config.get("head_dim") or hidden // heads
    projections = {"q_proj": (heads * head_dim, hidden), "o_proj": (hidden, heads * head_dim)}
    shares = family.cross_layer_attention and model_config.get("use_cla")
    share = model_config.get("cla_share_factor", 1) if shares else 1
    if index % share == 0:
        projections |= {"k_proj": (kv_heads * head_dim, hidden), "v_proj": (kv_heads * head_dim, hidden)}
    bias = sum(out for out, _ in projections.values()) if model_config.get("attention_bias") else 0
    head_norms = 2 * head_dim if model_config.get("use_qk_norm", family.qk_norm) else 0
    mlp = family.mlp(model_config, index)
    return LayerCount(
        attention=sum(out * width for out, width in projections.values()) + bias + head_norms,
        router=mlp.router,
        experts=mlp.experts,
        shared=mlp.shared,
        norms=2 * hidden,
        projections=projections,
    )


def _largest_gathered(count: ParameterCount, leaf: bool) -> int:
    """Parameters that ZeRO-3 holds whole at once: a layer's largest module, or the MoE block as a leaf.

    Experts are one fused module here, so that they are gathered together in any case.
    """
    block = max(layer.moe_block if leaf else layer.experts for layer in count.layers)
    return max(block, count.embeddings)


def _activation_bytes(
    model_config: dict[str, Any], count: ParameterCount, tokens: int, weight_bytes: int, checkpointing: bool
) -> int:
    """Saved activations of the layers: their inputs when recomputed, and one layer whole (arXiv 2205.05198)."""
    hidden = model_config["hidden_size"]
    width = model_config.get("moe_intermediate_size") or of_layer(model_config["intermediate_size"], 0)
    active = of_layer(model_config.get("moe_topk") or model_config.get("num_experts_per_tok") or 1, 0)
    shared = of_layer(model_config.get("num_shared_expert") or model_config.get("num_shared_experts") or 0, 0)
    mlps = active + shared if any(layer.router for layer in count.layers) else 1
    # Residual, norms, q, k, v, attention's output and projection; gate, up, product for each MLP a token passes.
    one_layer = tokens * (10 * hidden + 4 * width * mlps) * weight_bytes
    if checkpointing:
        return len(count.layers) * tokens * hidden * weight_bytes + one_layer
    return len(count.layers) * one_layer
