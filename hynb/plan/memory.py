"""Memory that a run takes on each GPU and each host, and disk space per checkpoint, from a model's config.json."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from hynb.errors import ModelError
from hynb.families import Family, ModelConfig, family_of
from hynb.plan.zero import PRESETS, Preset

_MLP = ("gate_proj", "up_proj", "down_proj")
# Tokens whose logits are in memory at the same time, in float32: 0.5 GB for a vocabulary of 128k.
LOSS_PIECE_TOKENS = 1024
# Mixed-precision Adam (arXiv 1910.02054, section 3.1): a float32 copy of each trained weight and two moments.
_OPTIMIZER_BYTES = 12
# CUDA context and NCCL buffers per GPU.
_CONTEXT_BYTES = 3 << 30
# Share of the tensors' size that the caching allocator loses to fragmentation.
_FRAGMENTATION = 0.08
# DeepSpeed's default `reduce_bucket_size`, for presets that leave it to the model's size.
_BUCKET_ELEMENTS = 500_000_000
# DeepSpeed's `sub_group_size`: elements that the optimizer updates together, counted per rank.
_SUB_GROUP_ELEMENTS = 1_000_000_000
# Python with its libraries, and a shard of the checkpoint while it is loaded, per process.
_PROCESS_BYTES = 6 << 30
# The same without the libraries of a GPU.
_CPU_PROCESS_BYTES = 400_000_000
# What a rank without a GPU keeps for as long as it trains, whatever the lengths of the samples.
_KEPT_PARTS = ("weights", "gradients", "optimizer")

# The largest value of each size in a config.json, far above that of any model.
_LARGEST = {
    **dict.fromkeys(
        ("num_hidden_layers", "num_nextn_predict_layers", "moe_layer_num_skipped", "cla_share_factor"), 10_000
    ),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "attention_head_dim"), 1_000_000),
    **dict.fromkeys(("num_experts", "moe_topk", "num_shared_expert", "num_experts_per_tok"), 1_000_000),
    **dict.fromkeys(("num_shared_experts", "hidden_size", "intermediate_size", "moe_intermediate_size"), 1 << 30),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), 1 << 30),
}


@dataclass(kw_only=True, frozen=True)
class LayerCount:
    """Parameters of one decoder layer by part.

    Args:
        active_width: intermediate width that each token passes through in the MLP.
        projections: shapes (out, in) of the attention's projections.
        linear: shapes (out, in) of all linear modules that an adapter can be on, by the last part of their names.
        fused: number, rows and columns of each tensor that holds the matrices of all experts.
        moves_mlp: as `Family.moves_mlp_adapters`.
    """

    attention: int
    router: int
    experts: int
    shared: int
    norms: int
    active_width: int
    projections: dict[str, tuple[int, int]]
    linear: dict[str, tuple[int, int]]
    fused: tuple[tuple[int, int, int], ...]
    moves_mlp: bool = False

    @property
    def total(self) -> int:
        """All parameters of the layer."""
        return self.attention + self.router + self.experts + self.shared + self.norms

    @property
    def active(self) -> int:
        """Parameters that each token passes through: of the experts, those that are chosen."""
        hidden_size = self.projections["q_proj"][1]
        return self.attention + self.router + self.norms + 3 * hidden_size * self.active_width

    @property
    def expert_tensors(self) -> tuple[int, ...]:
        """Elements of each tensor of the experts, which transformers 5 keeps fused, or of a dense layer's MLP."""
        third = self.experts // 3
        return (2 * third, self.experts - 2 * third) if self.router else (third, third, self.experts - 2 * third)

    @property
    def matrices(self) -> tuple[int, ...]:
        """Elements of each matrix of the layer."""
        projections = (out * width for out, width in self.projections.values())
        shared = (self.shared // 3,) * 3 if self.shared else ()
        return (*projections, *((self.router,) if self.router else ()), *self.expert_tensors, *shared)

    def lora(self, names: Collection[str], *, on_experts: bool) -> int:
        """Parameters of an adapter of rank 1, by the last parts of the names of linear modules."""
        moved = set(_MLP) & set(names) if self.moves_mlp and self.fused else set()
        size = sum(sum(self.linear[name]) for name in self.linear if name in names and name not in moved)
        if moved or on_experts:
            # The rank of a fused pair is that of both of its parts together.
            ranks = (2 if "gate_proj" in moved else int(on_experts), int(on_experts or "down_proj" in moved))
            size += sum(
                rank * count * (rows + columns)
                for rank, (count, rows, columns) in zip(ranks, self.fused, strict=False)
            )
        return size

    @property
    def moe_block(self) -> int:
        """Router, experts and shared MLP: what ZeRO-3 gathers at once if the block is a leaf."""
        return self.router + self.experts + self.shared


@dataclass(kw_only=True, frozen=True)
class ParameterCount:
    """Parameters of a model by part."""

    layers: tuple[LayerCount, ...]
    embeddings: int
    lm_head: int
    final_norm: int

    @property
    def total(self) -> int:
        """All parameters of the model; a tied output layer counts once."""
        return sum(layer.total for layer in self.layers) + self.embeddings + self.lm_head + self.final_norm

    @property
    def active(self) -> int:
        """Parameters that each token passes through, embeddings included."""
        return sum(layer.active for layer in self.layers) + self.embeddings + self.lm_head + self.final_norm

    @property
    def multiplied(self) -> int:
        """Parameters by which each token's vectors are multiplied: without the embeddings that are only looked up."""
        return self.active - (self.embeddings if self.lm_head else 0)

    @property
    def matrices(self) -> tuple[int, ...]:
        """Elements of each matrix of the model."""
        ends = tuple(size for size in (self.embeddings, self.lm_head) if size)
        return (*ends, *(size for layer in self.layers for size in layer.matrices))

    @property
    def attention(self) -> int:
        """What `train_attention_params_only` trains: the `self_attn` modules, head norms included."""
        return sum(layer.attention for layer in self.layers)

    def lora(self, rank: int, targets: Sequence[str], *, on_experts: bool = False) -> int:
        """Parameters of an adapter of this rank (arXiv 2106.09685).

        Args:
            targets: names of linear modules, of which the last part counts.
            on_experts: on the experts too, each of which gets an adapter of its own (peft 0.21, tuners/lora/layer.py,
                `ParamWrapper`).
        """
        names = {target.rpartition(".")[2] for target in targets}
        sizes = sum(layer.lora(names, on_experts=on_experts) for layer in self.layers)
        if "lm_head" in names:
            sizes += self.embeddings // self.final_norm + self.final_norm
        return rank * sizes


@dataclass(kw_only=True, frozen=True)
class Workload:
    """What is trained on how many GPUs; fields named as the parameters of a run, where there is one.

    Args:
        max_seq_length: tokens.
        sequence_parallel_size: GPUs that share each sequence.
        weight_bytes: bytes per weight in training: 2 for bf16 and fp16, 4 for float32.
    """

    world_size: int
    gpus_per_host: int
    use_lora: bool = False
    lora_rank: int = 64
    lora_target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    lora_on_experts: bool = False
    train_attention_params_only: bool = False
    micro_batch_size: int = 1
    max_seq_length: int = 2048
    sequence_parallel_size: int = 1
    gradient_checkpointing: bool = True
    make_moe_param_leaf_module: bool = False
    weight_bytes: int = 2

    @property
    def tokens_per_gpu(self) -> int:
        """Tokens of a micro-batch on one GPU."""
        return -(-self.micro_batch_size * self.max_seq_length // self.sequence_parallel_size)


@dataclass(kw_only=True, frozen=True)
class MemoryPlan:
    """What a run takes under one preset.

    Args:
        gpu_bytes: of each GPU.
        host_bytes: of each host.
        disk_bytes: of each checkpoint.
        parts: gpu_bytes by what they hold.
        host_parts: host_bytes by what they hold.
    """

    preset: Preset
    gpu_bytes: int
    host_bytes: int
    disk_bytes: int
    parts: dict[str, int]
    host_parts: dict[str, int]


def count_parameters(model_config: ModelConfig) -> ParameterCount:
    """Parameters of a model of a supported family.

    Args:
        model_config: the content of its config.json.

    Raises:
        ModelError: another family, or a config without the sizes.
    """
    family = family_of(model_config.get("model_type"))
    _check_sizes(model_config)
    try:
        hidden_size, vocab_size = model_config["hidden_size"], model_config["vocab_size"]
        layers = tuple(_layer(model_config, family, index) for index in range(model_config["num_hidden_layers"]))
    except (KeyError, TypeError, IndexError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ModelError(f"config.json of {family.model_type}: a size is missing or invalid: {error}") from None
    embeddings = vocab_size * hidden_size
    return ParameterCount(
        layers=layers,
        embeddings=embeddings,
        lm_head=0 if model_config.get("tie_word_embeddings", False) else embeddings,
        final_norm=hidden_size,
    )


def _check_sizes(model_config: ModelConfig) -> None:
    """Refuses sizes that no model has; a computation with them could take for ever.

    Raises:
        ModelError: with the key and its value.
    """
    for name, largest in _LARGEST.items():
        value = model_config.get(name)
        for item in value if isinstance(value, list) else [value]:
            if item is not None and (type(item) is not int or not 0 <= item <= largest):
                raise ModelError(
                    f"config.json: {name} = {str(value)[:80]}: must be a whole number from 0 to {largest:,}; "
                    "download the file again"
                )


def estimate(model_config: ModelConfig, workload: Workload, *, preset: str) -> MemoryPlan:
    """What a run takes under a preset (ZeRO: arXiv 1910.02054, ZeRO-Offload: arXiv 2101.06840).

    Args:
        model_config: the content of the model's config.json.

    Raises:
        ModelError: as `count_parameters`.
    """
    chosen, count = PRESETS[preset], count_parameters(model_config)
    adapter = adapter_size(count, workload)
    trained = adapter or (count.attention if workload.train_attention_params_only else count.total)
    weights_bytes = (count.total + adapter) * workload.weight_bytes
    gradients_bytes, optimizer_bytes = trained * workload.weight_bytes, trained * _OPTIMIZER_BYTES
    weights_per_gpu = weights_bytes // workload.world_size if chosen.stage == 3 else weights_bytes
    parts = {
        "weights": 0 if chosen.offload_param else weights_per_gpu,
        # DeepSpeed moves each bucket of gradients to where the optimizer is.
        "gradients": 0 if chosen.offload_optimizer else gradients_bytes // workload.world_size,
        "optimizer": 0 if chosen.offload_optimizer else optimizer_bytes // workload.world_size,
        **_buffers(chosen, count, trained, workload),
        "activations": _activation_bytes(model_config["hidden_size"], count, workload),
        "loss": _loss_bytes(count, model_config["vocab_size"], workload),
    }
    parts["fragmentation"] = int(sum(parts.values()) * _FRAGMENTATION)
    parts["CUDA"] = _CONTEXT_BYTES
    host_parts = _host_parts(chosen, count, trained, adapter, workload)
    return MemoryPlan(
        preset=chosen,
        gpu_bytes=sum(parts.values()),
        host_bytes=sum(host_parts.values()),
        # The model's or the adapter's file, DeepSpeed's copy of the same weights, and the optimizer.
        disk_bytes=(adapter or count.total) * workload.weight_bytes * 2 + optimizer_bytes,
        parts=parts,
        host_parts=host_parts,
    )


def adapter_size(count: ParameterCount, workload: Workload) -> int:
    """Parameters of the adapter that is trained; 0 without."""
    if not workload.use_lora:
        return 0
    return count.lora(workload.lora_rank, workload.lora_target_modules, on_experts=workload.lora_on_experts)


def cpu_bytes(plan: MemoryPlan, ranks: int) -> int:
    """The least memory that a run takes of a host with so many ranks, where they have no GPUs.

    The GPUs' part is in host memory too, and nothing is pinned. Activations, whose size depends on the samples, are
    left out: with these bytes and no more, a run would end for lack of memory.
    """
    kept = sum(plan.parts[name] * ranks + plan.host_parts[name] for name in _KEPT_PARTS)
    return kept + _CPU_PROCESS_BYTES * ranks


def pinned_bytes(size_bytes: int) -> int:
    """What torch allocates for a tensor in pinned host memory: the next power of two.

    torch 2.13, ATen/core/CachingHostAllocator.h, `roundSize`.
    """
    return 1 << max(0, size_bytes - 1).bit_length()


def compare(model_config: ModelConfig, workload: Workload) -> list[MemoryPlan]:
    """The same run under each preset, in the order of the presets.

    Raises:
        ModelError: as `count_parameters`.
    """
    return [estimate(model_config, workload, preset=name) for name in PRESETS]


def _host_parts(
    preset: Preset, count: ParameterCount, trained: int, adapter: int, workload: Workload
) -> dict[str, int]:
    """Bytes of host memory on each host (deepspeed/runtime/zero/stage3.py and stage_1_and_2.py, version 0.19.8)."""
    parts = {"weights": 0, "gradients": 0, "optimizer": 0}
    width, pinned = workload.weight_bytes, list[int]()

    def share(elements: int) -> int:
        return -(-elements // workload.world_size)

    if preset.offload_param:
        # Each rank's part of each matrix is pinned by itself; what is trained is then copied into one flat buffer,
        # and torch keeps the first memory for later.
        pinned += [share(size) * width for size in count.matrices] + [share(trained) * width]
        parts["weights"] = (share(count.total + adapter) + share(trained)) * width
    if preset.offload_optimizer:
        # Gradients in the weights' dtype, and in float32 for the optimizer.
        parts["gradients"] = share(trained) * (width + 4)
        parts["optimizer"] = share(trained) * _OPTIMIZER_BYTES
        pinned.append(share(trained) * width)
        if preset.stage == 3:
            trains_all = trained == count.total
            groups = _sub_groups(map(share, count.matrices if trains_all else [trained]))
            pinned += [size * 4 for size in groups]
        else:
            # The float32 weights are pinned too.
            pinned += [share(trained) * 4] * 2
    parts["rounding of pinned memory"] = sum(pinned_bytes(size) - size for size in pinned)
    parts["processes"] = _PROCESS_BYTES
    return {name: size * workload.gpus_per_host for name, size in parts.items()}


def _sub_groups(sizes: Iterable[int]) -> list[int]:
    """Elements of the groups of tensors that DeepSpeed's optimizer updates together under ZeRO-3."""
    groups = [0]
    for size in sizes:
        if groups[-1] >= _SUB_GROUP_ELEMENTS:
            groups.append(0)
        groups[-1] += size
    return groups


def _layer(model_config: ModelConfig, family: Family, index: int) -> LayerCount:
    hidden_size, heads = model_config["hidden_size"], model_config["num_attention_heads"]
    kv_heads = model_config.get("num_key_value_heads") or heads
    head_dim = model_config.get("head_dim") or model_config.get("attention_head_dim") or hidden_size // heads
    projections = {"q_proj": (heads * head_dim, hidden_size), "o_proj": (hidden_size, heads * head_dim)}
    shares_kv = family.cross_layer_attention and model_config.get("use_cla")
    if index % (model_config.get("cla_share_factor", 1) if shares_kv else 1) == 0:
        projections |= {"k_proj": (kv_heads * head_dim, hidden_size), "v_proj": (kv_heads * head_dim, hidden_size)}
    bias = sum(out for out, _ in projections.values()) if model_config.get("attention_bias") else 0
    head_norms = 2 * head_dim if model_config.get("use_qk_norm", family.qk_norm) else 0
    mlp = family.mlp_size(model_config, index)
    width, expert_width = mlp.linear_width, mlp.expert_width
    linear = dict(projections)
    if width:
        linear |= {
            "gate_proj": (width, hidden_size),
            "up_proj": (width, hidden_size),
            "down_proj": (hidden_size, width),
        }
    if mlp.router and family.linear_router:
        linear[family.linear_router] = (mlp.expert_count, hidden_size)
    fused = ((mlp.expert_count, 2 * expert_width, hidden_size), (mlp.expert_count, hidden_size, expert_width))
    return LayerCount(
        attention=sum(out * width for out, width in projections.values()) + bias + head_norms,
        router=mlp.router,
        experts=mlp.experts,
        shared=mlp.shared,
        norms=2 * hidden_size,
        active_width=mlp.active_width,
        projections=projections,
        linear=linear,
        fused=fused if mlp.router else (),
        moves_mlp=family.moves_mlp_adapters,
    )


def _buffers(preset: Preset, count: ParameterCount, trained: int, workload: Workload) -> dict[str, int]:
    """Bytes of the reduction buckets, and of the layers that ZeRO-3 gathers while it computes."""
    bucket = min(trained, preset.bucket_elements or _BUCKET_ELEMENTS)
    gathered = 0
    if preset.stage == 3:
        # One layer while it computes and, as far as the buffers allow, the next one prefetched.
        layer = _largest_gathered(count, workload.make_moe_param_leaf_module)
        gathered = layer + min(layer, preset.bucket_elements or layer)
    return {"buckets": bucket * workload.weight_bytes, "gathered layers": gathered * workload.weight_bytes}


def _largest_gathered(count: ParameterCount, leaf: bool) -> int:
    """Parameters that ZeRO-3 holds whole at once: the largest module, or the MoE block if it is a leaf.

    transformers 5 keeps all experts of a layer in one module, so that they are gathered together in any case.
    """
    block = max(layer.moe_block if leaf else layer.experts for layer in count.layers)
    return max(block, count.embeddings)


def _activation_bytes(hidden_size: int, count: ParameterCount, workload: Workload) -> int:
    """Saved activations of the layers (arXiv 2205.05198); with recomputation their inputs and one whole layer."""
    tokens = workload.tokens_per_gpu
    # Residual, norms, q, k, v, attention's output and projection; gate, up, product of the MLPs of each token.
    layers = [tokens * (10 * hidden_size + 4 * layer.active_width) * workload.weight_bytes for layer in count.layers]
    if workload.gradient_checkpointing:
        return len(layers) * tokens * hidden_size * workload.weight_bytes + max(layers)
    return sum(layers)


def _loss_bytes(count: ParameterCount, vocab_size: int, workload: Workload) -> int:
    """What hynb's loss takes at its peak, which computes logits and gradients in pieces (hunyuan_large/loss.py).

    Of each token the hidden state and its gradient; of a piece's tokens the logits and their exponentials in float32;
    of a trained output layer its gradient, which is summed in float32.
    """
    width = workload.weight_bytes
    tokens, hidden_size = workload.tokens_per_gpu, count.final_norm
    if workload.use_lora and any(name.rpartition(".")[2] == "lm_head" for name in workload.lora_target_modules):
        # An adapter on the output layer needs all logits, their float32 copy and its gradient.
        return tokens * vocab_size * (8 + width)
    trains_head = not workload.use_lora and not workload.train_attention_params_only
    gradient = vocab_size * hidden_size * (4 + width) if trains_head else 0
    return min(tokens, LOSS_PIECE_TOKENS) * vocab_size * 8 + 2 * tokens * hidden_size * width + gradient
