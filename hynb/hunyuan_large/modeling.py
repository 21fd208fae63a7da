"""Models of model_type `hunyuan`, Hunyuan-Large above all, as a variant of transformers' `hunyuan_v1_moe`.

They differ by cross-layer attention, top-1 routing without renormalisation, optional q/k norm and shared MLP, and
sizes per layer. Hunyuan-A13B's older folders have the same model type and key names, and load into the same classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.hunyuan_v1_moe import modeling_hunyuan_v1_moe as v1
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hynb.hunyuan_large.configuration import HunYuanLargeConfig
from hynb.hunyuan_large.loss import LanguageModelHead, causal_loss


class HunYuanLargeAttention(nn.Module):
    """Attention whose projected K and V may come from an earlier layer."""

    def __init__(self, config: HunYuanLargeConfig, layer_idx: int) -> None:
        super().__init__()
        # The configuration's __post_init__ derives both.
        assert config.head_dim is not None and config.num_key_value_heads is not None
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=config.attention_bias)
        if config.owns_kv(layer_idx):
            self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=config.attention_bias)
            self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=config.attention_bias)
        if config.use_qk_norm:
            self.query_layernorm = v1.HunYuanMoEV1RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.key_layernorm = v1.HunYuanMoEV1RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        shared_key: torch.Tensor | None,
        shared_value: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Output, attention weights, and the projected K and V (batch × length × width).

        In upstream's order: project, RoPE, norm of each head, cache, attention.
        """
        batch_and_length = hidden_states.shape[:-1]

        def by_head(states: torch.Tensor) -> torch.Tensor:
            return states.view(*batch_and_length, -1, self.head_dim).transpose(1, 2)

        if self.config.owns_kv(self.layer_idx):
            shared_key, shared_value = self.k_proj(hidden_states), self.v_proj(hidden_states)
        assert shared_key is not None and shared_value is not None
        query, key, value = map(by_head, (self.q_proj(hidden_states), shared_key, shared_value))
        query, key = v1.apply_rotary_pos_emb(query, key, *position_embeddings)
        if self.config.use_qk_norm:
            query, key = self.query_layernorm(query), self.key_layernorm(key)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        name = self.config._attn_implementation or "eager"
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(name, v1.eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = self.o_proj(output.reshape(*batch_and_length, -1).contiguous())
        return output, weights, shared_key, shared_value


class HunYuanLargeMLP(v1.HunYuanMoEV1MLP):
    """A gated MLP with a given intermediate width."""

    def __init__(self, config: HunYuanLargeConfig, width: int) -> None:
        nn.Module.__init__(self)
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]


class HunYuanLargeGate(nn.Module):
    """The router: a float32 softmax over experts. Top-1 keeps its raw probability; top-k is usually renormalised."""

    def __init__(self, config: HunYuanLargeConfig, layer_idx: int) -> None:
        super().__init__()
        self.top_k = config.of_layer("moe_topk", layer_idx)
        self.num_experts = config.of_layer("num_experts", layer_idx)
        self.renormalise = self.top_k > 1 and config.norm_topk_prob
        self.scaling_factor = config.routed_scaling_factor
        self.wg = nn.Linear(config.hidden_size, self.num_experts, bias=False, dtype=torch.float32)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Router logits (tokens × experts), and weights and ids of the chosen experts (tokens × top_k)."""
        logits = self.wg(tokens.to(self.wg.weight.dtype))
        weights, chosen = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float32), self.top_k, dim=-1)
        if self.renormalise:
            # Upstream's floor under the sum, which keeps the weights finite when all probabilities underflow.
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)
        else:
            weights = weights * self.scaling_factor
        return logits, weights, chosen


class HunYuanLargeMoE(nn.Module):
    """Routed experts, and optionally a shared MLP that every token passes through."""

    def __init__(self, config: HunYuanLargeConfig, layer_idx: int) -> None:
        super().__init__()
        self.gate = HunYuanLargeGate(config, layer_idx)
        # The experts' class reads one number of experts and one width; a list has one per layer.
        layer_config = copy.copy(config)
        layer_config.num_experts = self.gate.num_experts
        layer_config.intermediate_size = config.expert_width(layer_idx)
        self.experts = v1.HunYuanMoEV1Experts(layer_config)
        # The model's own config, in which transformers changes how experts are computed.
        self.experts.config = config  # pyright: ignore[reportArgumentType]  nn.Module's annotation lacks plain values
        self.shared_mlp = None
        if config.use_mixed_mlp_moe:
            width = config.expert_width(layer_idx) * config.of_layer("num_shared_expert", layer_idx)
            self.shared_mlp = HunYuanLargeMLP(config, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """shared_mlp(x) + experts(x); no token is dropped."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, chosen = self.gate(tokens)
        routed = self.experts(tokens, chosen, weights.to(tokens.dtype)).view_as(hidden_states)
        return routed if self.shared_mlp is None else self.shared_mlp(hidden_states) + routed


class HunYuanLargeDecoderLayer(GradientCheckpointingLayer):
    """A decoder layer; one that projects K and V returns them for the layers that reuse them."""

    def __init__(self, config: HunYuanLargeConfig, layer_idx: int) -> None:
        super().__init__()
        self.returns_kv = config.use_cla and config.owns_kv(layer_idx)
        self.self_attn = HunYuanLargeAttention(config, layer_idx)
        if config.has_experts(layer_idx):
            self.mlp = HunYuanLargeMoE(config, layer_idx)
        else:
            self.mlp = HunYuanLargeMLP(config, config.intermediate_size)
        self.input_layernorm = v1.HunYuanMoEV1RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = v1.HunYuanMoEV1RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        shared_key: torch.Tensor | None = None,
        shared_value: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The layer's output; with K and V after it if later layers reuse them.

        K and V are positional tensors, because reentrant checkpointing carries no gradient through a tuple or a
        keyword argument; upstream's code loses a part of its gradients that way.
        """
        attended, _, key, value = self.self_attn(
            self.input_layernorm(hidden_states), shared_key, shared_value, **kwargs
        )
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return (hidden_states, key, value) if self.returns_kv else hidden_states


class HunYuanLargePreTrainedModel(v1.HunYuanMoEV1PreTrainedModel):
    """Settings for loading, saving and generation."""

    config: HunYuanLargeConfig  # pyright: ignore[reportIncompatibleVariableOverride]  transformers' own habit
    config_class = HunYuanLargeConfig
    _no_split_modules = ["HunYuanLargeDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": HunYuanLargeDecoderLayer,
        "attentions": OutputRecorder(HunYuanLargeAttention, index=1),
        "router_logits": OutputRecorder(HunYuanLargeGate, index=0),
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for its decorator in this file's text and would otherwise use the slow loop.
        return True


class HunYuanLargeModel(HunYuanLargePreTrainedModel):
    """The decoder without its output layer."""

    def __init__(self, config: HunYuanLargeConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            HunYuanLargeDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = v1.HunYuanMoEV1RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = v1.HunYuanMoEV1RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Hidden states (batch × length × hidden) of either token ids or embeddings.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states, key, value = inputs_embeds, None, None
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            output = layer(
                hidden_states,
                key,
                value,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
            if layer.returns_kv:
                hidden_states, key, value = output
            else:
                hidden_states = output
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class HunYuanLargeForCausalLM(HunYuanLargePreTrainedModel, GenerationMixin):
    """The decoder with its output layer.

    Attributes:
        loss_piece_tokens: if set, a call with labels returns the loss without logits and computes it in pieces of
            this many tokens, whose logits are in memory at the same time.
    """

    _tied_weights_keys = v1.HunYuanMoEV1ForCausalLM._tied_weights_keys
    loss_piece_tokens: int | None = None

    def __init__(self, config: HunYuanLargeConfig) -> None:
        super().__init__(config)
        self.model = HunYuanLargeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits (batch × length × vocabulary), and with labels the mean next-token loss.

        Args:
            labels: batch × length; -100 at unsupervised positions.
            logits_to_keep: the number of last positions whose logits are returned; 0 for all.
            num_items_in_batch: divisor of the summed loss in place of the number of supervised positions.
            shift_labels: batch × length; the label of each position's next token, which counts instead of `labels`.
        """
        # All by name: `generate` reads this signature for the inputs that it must prepare.
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        logits = loss = None
        counted = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}
        if labels is not None and self.loss_piece_tokens and type(self.lm_head) is LanguageModelHead:
            loss = causal_loss(self.lm_head, hidden, labels, piece=self.loss_piece_tokens, **counted)
        else:
            logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
            if labels is not None:
                vocab_size = self.config.vocab_size
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **counted)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )
