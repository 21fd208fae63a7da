"""The configuration of Hunyuan-Large (model_type `hunyuan`), read from and written as the original's config.json."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import HunYuanMoEV1Config


@strict
class HunYuanLargeConfig(HunYuanMoEV1Config):
    """Sizes and switches of a Hunyuan-Large model; the fields that `hunyuan_v1_moe` has are its own.

    use_cla, cla_share_factor: layer i projects K and V only if i % cla_share_factor == 0 (arXiv 2405.12981).
    use_mixed_mlp_moe, num_shared_expert: a shared MLP beside the experts, num_shared_expert experts wide.
    use_qk_norm: RMSNorm on each head's query and key, after RoPE.
    """

    model_type = "hunyuan"
    # Beside transformers' own keys of a "dynamic" scaling, and the one that makes it static.
    ignore_keys_at_rope_validation = {"alpha"}  # noqa: RUF012

    num_experts: int | list[int] = 1
    use_cla: bool = False
    cla_share_factor: int = 1
    use_mixed_mlp_moe: bool = False
    num_shared_expert: int | list[int] = 1
    use_qk_norm: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Fills in what the original leaves to be derived."""
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        scaling = kwargs.get("rope_scaling")
        if scaling and scaling.get("alpha"):
            # transformers demands a factor of every "dynamic" scaling; beside alpha it means nothing.
            kwargs["rope_scaling"] = {"factor": 1.0, **scaling}
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The original's keys: transformers' `rope_parameters` alone would be read as plain RoPE elsewhere.

        vLLM finds a model by the class that `architectures` names: the original's.
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
        """What config.json holds; software before transformers 5 reads the dtype from `torch_dtype`."""
        written = super().to_diff_dict()
        return written | ({"torch_dtype": written["dtype"]} if written.get("dtype") else {})

    def owns_kv(self, layer_idx: int) -> bool:
        """Whether a layer projects K and V itself instead of sharing those of a layer before it."""
        return not self.use_cla or layer_idx % self.cla_share_factor == 0

    def of_layer(self, name: str, layer_idx: int) -> int:
        """A value that may be given once or for each layer."""
        value = getattr(self, name)
        return value if isinstance(value, int) else value[layer_idx]
