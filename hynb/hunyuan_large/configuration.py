"""The configuration of model_type `hunyuan`, in the format of upstream's config.json.

Hunyuan-Large has this model type, and so have Hunyuan-A13B's folders from before its `hunyuan_v1_moe`.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import HunYuanMoEV1Config

# Options of upstream's model code that change the result, and that no published model of this type sets.
_UNSUPPORTED = ("group_limited_greedy", "use_mla", "mlp_bias")


@strict
class HunYuanLargeConfig(HunYuanMoEV1Config):
    """Sizes and options of a Hunyuan-Large model, beyond those of `hunyuan_v1_moe`.

    Args:
        use_cla, cla_share_factor: layer i projects K and V only if i % cla_share_factor == 0; the other layers reuse
            those of the layer before them (cross-layer attention, arXiv 2405.12981).
        use_mixed_mlp_moe, num_shared_expert: a shared MLP beside the experts, as wide as num_shared_expert experts.
        use_qk_norm: RMSNorm on each head's query and key, after RoPE.
        moe_intermediate_size: width of each expert; None for intermediate_size.
        moe_layer_num_skipped: number of first layers that have a dense MLP of intermediate_size.
        norm_topk_prob: whether the probabilities of several chosen experts are divided by their sum.
        routed_scaling_factor: factor of probabilities that are not divided by their sum.
        attention_head_dim: head_dim, by the name that Hunyuan-A13B's config.json gives it.
    """

    model_type = "hunyuan"
    # Not one of transformers' own keys of a "dynamic" scaling; it makes the scaling static.
    ignore_keys_at_rope_validation = {"alpha"}  # noqa: RUF012

    # One number, or one per layer: wider than the base class allows.
    num_experts: int | list[int] = 1  # pyright: ignore[reportIncompatibleVariableOverride]
    use_cla: bool = False
    cla_share_factor: int = 1
    use_mixed_mlp_moe: bool = False
    num_shared_expert: int | list[int] = 1
    use_qk_norm: bool = False
    moe_intermediate_size: int | list[int] | None = None
    moe_layer_num_skipped: int = 0
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    attention_head_dim: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Derives what upstream's config.json may leave out.

        Raises:
            ValueError: an option of upstream's code that HunYuanLargeForCausalLM does not have.
        """
        if unsupported := [name for name in _UNSUPPORTED if kwargs.get(name)]:
            raise ValueError(f"config.json: {', '.join(unsupported)} = true: not supported for model_type hunyuan")
        if self.head_dim is None:
            self.head_dim = self.attention_head_dim or self.hidden_size // self.num_attention_heads
        scaling = kwargs.get("rope_scaling")
        if scaling and scaling.get("alpha"):
            # transformers requires a factor in every "dynamic" scaling; with alpha it has no effect.
            kwargs["rope_scaling"] = {"factor": 1.0, **scaling}
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Upstream's keys: other software would read transformers' `rope_parameters` alone as plain RoPE.

        vLLM finds a model by upstream's class name in `architectures`.
        """
        written = super().to_dict()
        if written.get("architectures"):
            written["architectures"] = [name.replace("HunYuanLarge", "HunYuan") for name in written["architectures"]]
        rope = dict(self.rope_parameters or {})
        written["rope_theta"] = rope.pop("rope_theta", 10000.0)
        kind = rope.pop("rope_type", "default")
        rope.pop("type", None)
        scaled = rope.get("alpha") or kind != "default"
        written["rope_scaling"] = {"type": kind, **rope} if scaled else None
        return written

    def to_diff_dict(self) -> dict[str, Any]:
        """The content of config.json; software older than transformers 5 reads the dtype from `torch_dtype`."""
        written = super().to_diff_dict()
        return written | ({"torch_dtype": written["dtype"]} if written.get("dtype") else {})

    def owns_kv(self, layer_idx: int) -> bool:
        """Whether a layer projects K and V itself instead of reusing those of an earlier layer."""
        return not self.use_cla or layer_idx % self.cla_share_factor == 0

    def has_experts(self, layer_idx: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return layer_idx >= self.moe_layer_num_skipped and self.of_layer("num_experts", layer_idx) > 1

    def expert_width(self, layer_idx: int) -> int:
        """Intermediate width of each expert of a layer."""
        name = "intermediate_size" if self.moe_intermediate_size is None else "moe_intermediate_size"
        return self.of_layer(name, layer_idx)

    def of_layer(self, name: str, layer_idx: int) -> int:
        """One layer's value of a field that holds one number, or one per layer."""
        value = getattr(self, name)
        return value if isinstance(value, int) else value[layer_idx]
