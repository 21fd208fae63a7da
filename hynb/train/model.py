"""The model that a run trains, and its tokenizer: loaded from a folder, or random."""

from __future__ import annotations

import functools
import importlib.util
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils.generic import ModelOutput

from hynb.config import MODEL_SIZE_NAMES, Config, random_model_config
from hynb.data import load_tokenizer_folder
from hynb.errors import ModelError
from hynb.families import FAMILIES
from hynb.hunyuan_large import PACKED_SDPA, HunYuanLargeForCausalLM, LanguageModelHead, causal_loss
from hynb.merge import TensorEntry
from hynb.plan import memory
from hynb.train.byte_progress import ByteProgress
from hynb.train.checkpoint import base_tensors, copy_model_files
from hynb.train.library_loading import counted_reads

logger = logging.getLogger(__name__)

# The package that each needs, and transformers' name of it.
_ATTENTION = {"flash": ("flash_attn", "flash_attention_2"), "flex": ("triton", "flex_attention")}


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token of padding, which is masked and has no labels, so that any serves where a tokenizer names none."""
    token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return token_id if isinstance(token_id, int) else 0


def load_tokenizer(config: Config, base: Path | None) -> tuple[PreTrainedTokenizerBase, Path]:
    """The tokenizer, and the folder that it was loaded from.

    Args:
        base: the base model's folder, which has the tokenizer unless `tokenizer_name_or_path` names another.

    Raises:
        ModelError: the tokenizer cannot be loaded or has no chat template.
    """
    named = config.tokenizer_name_or_path or base
    if named is None:
        raise ModelError("tokenizer_name_or_path: is needed where there is neither a base model nor a checkpoint")
    folder = Path(named).expanduser().absolute()
    tokenizer = load_tokenizer_folder(folder, trust_remote_code=config.trust_remote_code)
    if config.model_max_length is not None:
        tokenizer.model_max_length = config.model_max_length
    if tokenizer.chat_template is None:
        raise ModelError(f"{folder}: the tokenizer has no chat template; use the tokenizer of an instruct model")
    return tokenizer, folder


def load_model(
    config: Config,
    base: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stored: Sequence[TensorEntry] | None = None,
    show_progress: Callable[[str], None] | None = None,
) -> PreTrainedModel:
    """The model that a run begins with: with the base's weights, or random with the sizes of the Config.

    Under ZeRO-3 each rank holds its shard of the weights, provided that the TrainingArguments exist already.

    Args:
        stored: the tensors of the base, as from `base_tensors`; None to read the headers of its files here.
        show_progress: takes a text such as "312 of 777 GB, 4.1 GB/s" once per second.

    Raises:
        ModelError: the folder cannot be loaded, or lacks a tensor of the model.
    """
    options = {"dtype": training_dtype(config), "attn_implementation": _attention(config)}
    if base is None:
        return _random_model(config, tokenizer, options)
    ignored = sorted(config.given & set(MODEL_SIZE_NAMES))
    if ignored:
        logger.info(f"ignored, because the model folder decides them: {', '.join(ignored)}")
    try:
        with _loading(base, stored, show_progress):
            # A pair only because of output_loading_info, which the annotation does not know.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                base, trust_remote_code=config.trust_remote_code, output_loading_info=True, **options
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{base}: the model cannot be loaded: {error}") from error
    model, info = loaded
    dropout = getattr(model.config, "attention_dropout", 0)
    if dropout and model.config._attn_implementation == "flex_attention":
        raise ModelError(
            f"{base / 'config.json'}: attention_dropout = {dropout}: transformers has no dropout in flex attention; "
            "leave attention = flex out, or set attention_dropout to 0"
        )
    problems = [
        f"{base}: {what}: {', '.join(sorted(map(str, info[key]))[:5])}. They would be random"
        for key, what in (("missing_keys", "tensors are missing"), ("mismatched_keys", "tensors have other shapes"))
        if info.get(key)
    ]
    if problems:
        raise ModelError(problems)
    return model


def write_random_base(
    config: Config, tokenizer: PreTrainedTokenizerBase, tokenizer_folder: Path, folder: Path
) -> None:
    """Saves a random model with the sizes of the Config as a base folder, which an adapter needs to be merged."""
    set_seed(config.seed)
    options = {"dtype": training_dtype(config), "attn_implementation": "sdpa"}
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    _random_model(config, tokenizer, options).save_pretrained(unfinished)
    copy_model_files(None, tokenizer_folder, unfinished)
    unfinished.replace(folder)
    logger.info(f"the random base model of this adapter is kept in {folder}")


def save_loss_memory(model: PreTrainedModel, *, piece_tokens: int = memory.LOSS_PIECE_TOKENS) -> None:
    """Makes a model compute its loss in pieces: the logits of a long sequence over 128k tokens would fill a GPU.

    Hunyuan-Large supports this itself. The forward pass of transformers' own Hunyuan classes is replaced by one that
    returns the loss without logits when there are labels.

    Args:
        piece_tokens: tokens whose logits are in memory at the same time.
    """
    if isinstance(model, HunYuanLargeForCausalLM):
        model.loss_piece_tokens = piece_tokens
        return
    plain = model.forward
    if model.config.model_type not in FAMILIES or type(model.lm_head) is not torch.nn.Linear:
        return
    model.lm_head.__class__ = LanguageModelHead

    # The Trainer reads the signature for the inputs that the model takes.
    @functools.wraps(plain)
    def forward(*args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> ModelOutput:
        # An adapter on the output layer has replaced it and needs logits.
        if labels is None or args or type(model.lm_head) is not LanguageModelHead:
            return plain(*args, labels=labels, **kwargs)
        counted = {name: kwargs.pop(name, None) for name in ("num_items_in_batch", "shift_labels")}
        hidden = model.model(**kwargs).last_hidden_state
        loss = causal_loss(model.lm_head, hidden, labels, piece=piece_tokens, **counted)
        return CausalLMOutput(loss=loss)

    model.forward = forward


def training_dtype(config: Config) -> torch.dtype:
    """The dtype of the weights in training."""
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32


def mark_moe_leaves(model: PreTrainedModel) -> None:
    """Makes ZeRO-3 gather each MoE block as a whole instead of expert by expert.

    Raises:
        ModelError: the model has no MoE blocks, or hynb does not know its family.
    """
    from deepspeed.utils import set_z3_leaf_modules

    model_type = model.config.model_type
    family = FAMILIES.get(model_type)
    if family is None:
        raise ModelError(
            f"make_moe_param_leaf_module: hynb knows no MoE block of model_type {model_type}; "
            "leave make_moe_param_leaf_module out"
        )
    block = family.moe_block_class()
    if block is None or not any(isinstance(item, block) for item in model.modules()):
        raise ModelError(
            "make_moe_param_leaf_module: this model is dense, it has no experts; leave make_moe_param_leaf_module out"
        )
    set_z3_leaf_modules(model, [block])


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Numbers of all `parameters` and of `trainable_parameters`, also where ZeRO-3 holds only a shard of each."""
    counts = {"parameters": 0, "trainable_parameters": 0}
    for weight in model.parameters():
        count = getattr(weight, "ds_numel", None) or weight.numel()
        counts["parameters"] += count
        counts["trainable_parameters"] += count if weight.requires_grad else 0
    # Routers that are kept in float32.
    counts["parameters"] += sum(value.numel() for name, value in model.named_buffers() if name.endswith(".weight"))
    return counts


def _attention(config: Config) -> str:
    """transformers' name of the attention implementation."""
    sdpa = PACKED_SDPA if config.packing or config.sequence_parallel_size > 1 else "sdpa"
    wanted = "flash" if config.attention == "auto" and config.use_flash_attn else config.attention
    if wanted in ("auto", "sdpa"):
        return sdpa
    package, name = _ATTENTION[wanted]
    if importlib.util.find_spec(package) is not None and torch.cuda.is_available():
        return name
    missing = "there is no GPU" if not torch.cuda.is_available() else f"the package {package} is not installed"
    parameter = "use_flash_attn" if config.attention == "auto" else f"attention = {wanted}"
    logger.info(f"{parameter}: {missing}; PyTorch's sdpa is used instead, with the same result")
    return sdpa


def _loading(
    base: Path, stored: Sequence[TensorEntry] | None, show_progress: Callable[[str], None] | None
) -> AbstractContextManager[None]:
    """Within it, from_pretrained shows its progress, and reads only this rank's share where ZeRO-3 shards weights."""
    stored = base_tensors(base) if stored is None else stored
    if not is_deepspeed_zero3_enabled():
        # Every rank reads all.
        return counted_reads(stored, ByteProgress("loading", show=show_progress))
    # Imports DeepSpeed, which takes seconds.
    from hynb.train.loading import partitions_from_files

    factor = torch.distributed.get_world_size()
    return partitions_from_files(stored, ByteProgress("loading", factor=factor, show=show_progress))


def _random_model(config: Config, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> PreTrainedModel:
    logger.info(
        "NO MODEL WAS GIVEN: training begins with RANDOM WEIGHTS of the given sizes. "
        "To fine-tune, set model_name_or_path"
    )
    sizes = random_model_config(config)
    random_model = FAMILIES[sizes["model_type"]].random_model
    if random_model and random_model.chosen_by:
        logger.info(
            f"the random model is a {sizes['model_type']}, because {' or '.join(random_model.chosen_by)} is given; "
            f"{random_model.note}"
        )
    model_config = AutoConfig.for_model(
        **sizes,
        vocab_size=config.vocab_size or len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if model_config.vocab_size < len(tokenizer):
        raise ModelError(
            f"vocab_size = {config.vocab_size} is below the tokenizer's {len(tokenizer)}; set it to auto"
        )
    torch.manual_seed(config.seed)
    return AutoModelForCausalLM.from_config(model_config, **options)
