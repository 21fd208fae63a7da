"""The model that a run trains: loaded or made, with its adapter, frozen parts and ZeRO-3 leaves."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutput, ModelOutput

import hynb.hunyuan_large  # noqa: F401  registers the model with the Auto classes
from hynb.config import MODEL_SIZE_NAMES, Config
from hynb.errors import ModelError
from hynb.families import FAMILIES
from hynb.hunyuan_large.loss import LanguageModelHead, causal_loss
from hynb.train.checkpoint import carry_over

# Tokens whose logits are in memory at once: 0.5 GB over a vocabulary of 128k, in float32.
_LOSS_PIECE_TOKENS = 1024
Say = Callable[[str], None]


def load_tokenizer(config: Config, base: Path | None) -> tuple[PreTrainedTokenizerBase, Path]:
    """The tokenizer and the folder that it came from.

    Raises:
        ModelError: the folder's files are no tokenizer that can be loaded.
    """
    folder = Path(config.tokenizer_name_or_path or base).expanduser().absolute()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
    if config.model_max_length is not None:
        tokenizer.model_max_length = config.model_max_length
    if tokenizer.chat_template is None:
        raise ModelError(f"{folder}: the tokenizer has no chat template; take the one of an instruct model")
    return tokenizer, folder


def load_model(config: Config, base: Path | None, tokenizer: PreTrainedTokenizerBase, say: Say) -> PreTrainedModel:
    """The model that a run begins with: the base's weights, or random ones of the given sizes.

    Under ZeRO-3 the weights come sharded, because TrainingArguments were made before.

    Args:
        say: takes each line that the user should read.

    Raises:
        ModelError: the folder cannot be loaded, or a tensor of the model is not in it.
    """
    options = {"dtype": training_dtype(config), "attn_implementation": attention(config, say)}
    if base is None:
        return _random_model(config, tokenizer, options, say)
    ignored = sorted(config.given & set(MODEL_SIZE_NAMES))
    if ignored:
        say(f"ignored, because the model folder decides them: {', '.join(ignored)}")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            base, trust_remote_code=config.trust_remote_code, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{base}: the model cannot be loaded: {error}") from error
    problems = [
        f"{base}: {what}: {', '.join(sorted(map(str, info[key]))[:5])}. Random weights would take their place"
        for key, what in (("missing_keys", "tensors are missing"), ("mismatched_keys", "shapes differ"))
        if info.get(key)
    ]
    if problems:
        raise ModelError(problems)
    return model


def write_random_base(
    config: Config, tokenizer: PreTrainedTokenizerBase, tokenizer_folder: Path, folder: Path, say: Say
) -> None:
    """Saves a random model of the given sizes as a base folder, for an adapter to be trained and merged with."""
    options = {"dtype": training_dtype(config), "attn_implementation": "sdpa"}
    beside = folder.with_name(f".{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    _random_model(config, tokenizer, options, say).save_pretrained(beside)
    carry_over(None, tokenizer_folder, beside)
    beside.replace(folder)
    say(f"the random base model of this adapter is kept in {folder}")


def save_loss_memory(model: PreTrainedModel) -> None:
    """Lets a model compute its loss in pieces: the logits of a long sequence over 128k tokens would fill a GPU.

    Hunyuan-Large does so by itself; transformers' own Hunyuan classes get a forward pass that returns the loss
    without logits where there are labels.
    """
    if hasattr(type(model), "loss_piece_tokens"):
        model.loss_piece_tokens = _LOSS_PIECE_TOKENS
        return
    plain = model.forward
    if model.config.model_type not in FAMILIES or type(model.lm_head) is not torch.nn.Linear:
        return
    model.lm_head.__class__ = LanguageModelHead

    # The Trainer reads the signature to see what the model takes.
    @functools.wraps(plain)
    def forward(*args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> ModelOutput:
        # An adapter on the output layer takes its place; it makes logits.
        if labels is None or args or type(model.lm_head) is not LanguageModelHead:
            return plain(*args, labels=labels, **kwargs)
        count = kwargs.pop("num_items_in_batch", None)
        hidden = model.model(**kwargs).last_hidden_state
        counted = {"piece": _LOSS_PIECE_TOKENS, "num_items_in_batch": count}
        return CausalLMOutput(loss=causal_loss(model.lm_head, hidden, labels, **counted))

    model.forward = forward


def training_dtype(config: Config) -> torch.dtype:
    """The dtype of the weights in training."""
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32


def attention(config: Config, say: Say) -> str:
    """transformers' name of the attention that is used."""
    if not config.use_flash_attn:
        return "sdpa"
    if importlib.util.find_spec("flash_attn") is not None and torch.cuda.is_available():
        return "flash_attention_2"
    missing = "no GPU is here" if not torch.cuda.is_available() else "the package flash_attn is not installed"
    say(f"use_flash_attn: {missing}; PyTorch's sdpa is used instead, with the same result")
    return "sdpa"


def mark_moe_leaves(model: PreTrainedModel) -> None:
    """Makes ZeRO-3 gather each MoE block as a whole instead of expert by expert.

    Raises:
        ModelError: for a model without MoE blocks.
    """
    from deepspeed.utils import set_z3_leaf_modules

    model_type = model.config.model_type
    family = FAMILIES.get(model_type)
    if family is None:
        raise ModelError(
            f"make_moe_param_leaf_module: hynb knows no MoE block of model_type {model_type}; leave it off"
        )
    block = family.moe_block_class()
    if block is None or not any(isinstance(item, block) for item in model.modules()):
        raise ModelError("make_moe_param_leaf_module: this model is dense, it has no experts; leave it off")
    set_z3_leaf_modules(model, [block])


def _random_model(
    config: Config, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], say: Say
) -> PreTrainedModel:
    say(
        "NO MODEL WAS GIVEN: training begins with RANDOM WEIGHTS of the given sizes. "
        "To fine-tune, set model_name_or_path"
    )
    model_config = AutoConfig.for_model(
        "hunyuan",
        vocab_size=config.vocab_size or len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads or config.num_attention_heads,
        num_experts=config.num_experts,
        moe_topk=config.moe_topk,
        use_cla=config.use_cla,
        cla_share_factor=config.cla_share_factor,
        use_mixed_mlp_moe=config.use_mixed_mlp_moe,
        num_shared_expert=config.num_shared_expert,
        use_qk_norm=config.use_qk_norm,
        tie_word_embeddings=config.tie_word_embeddings,
        max_position_embeddings=max(2048, config.max_seq_length),
        rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if model_config.vocab_size < len(tokenizer):
        raise ModelError(
            f"vocab_size = {config.vocab_size} is below the tokenizer's {len(tokenizer)}; leave it on auto"
        )
    torch.manual_seed(config.seed)
    return AutoModelForCausalLM.from_config(model_config, **options)


def describe(model: torch.nn.Module) -> dict[str, int]:
    """Counts of all and of trainable parameters, also where ZeRO-3 holds only a share of each."""
    counts = {"parameters": 0, "trainable_parameters": 0}
    for weight in model.parameters():
        count = getattr(weight, "ds_numel", None) or weight.numel()
        counts["parameters"] += count
        counts["trainable_parameters"] += count if weight.requires_grad else 0
    return counts
