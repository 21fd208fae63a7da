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
from safetensors import safe_open
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
from hynb.hunyuan_large.loss import LanguageModelHead, causal_loss
from hynb.moe_health import routers
from hynb.run_checks import (
    BASE_IDENTITY,
    CHECKPOINT_RECORD,
    NATIVE_MODEL_TYPES,
    base_identity,
    resume_checkpoint,
)
from hynb.run_dir import read_json, write_json

# The MoE block of each family: the module that ZeRO-3 gathers whole when it is marked as a leaf.
MOE_BLOCKS = {
    "hunyuan": ("hynb.hunyuan_large", "HunYuanLargeMoE"),
    "hunyuan_v1_moe": ("transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe", "HunYuanMoEV1Moe"),
    "hy_v3": ("transformers.models.hy_v3.modeling_hy_v3", "HYV3MoE"),
}

# Files of a base folder that a full checkpoint writes itself; all others travel along.
_REWRITTEN = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt")

# What a checkpoint that is resumed from holds beside the model: the new checkpoint writes its own.
_TRAINING_FILES = ("trainer_state.json", "latest", "zero_to_fp32.py", CHECKPOINT_RECORD, BASE_IDENTITY)

# Tokens whose logits are in memory at once: 0.5 GB over a vocabulary of 128k, in float32.
_LOSS_PIECE_TOKENS = 1024
Say = Callable[[str], None]


def find_base(config: Config) -> Path | None:
    """The folder whose weights the run begins with; None for a random model.

    A resumed run without `model_name_or_path` finds it in the checkpoint: a LoRA checkpoint names its base,
    a full one is its own.

    Raises:
        ModelError: the base that a LoRA checkpoint names is not there, or another one was given.
    """
    given = Path(config.model_name_or_path).expanduser().absolute() if config.model_name_or_path else None
    checkpoint = resume_checkpoint(config)
    if checkpoint is None:
        return given
    adapter = read_json(checkpoint / "adapter_config.json")
    if adapter is None:
        return checkpoint
    base = given or Path(adapter.get("base_model_name_or_path") or "")
    if not (base / "config.json").is_file():
        raise ModelError(
            f"{checkpoint}: is an adapter for the base {base}, which is not there. "
            "Name the base's new place with model_name_or_path"
        )
    recorded = read_json(checkpoint / BASE_IDENTITY)
    if recorded is not None and recorded["hash"] != base_identity(base)["hash"]:
        raise ModelError(
            f"{checkpoint}: was trained on another base than {base} (config or weights differ). "
            f"Its base was {recorded['path']}"
        )
    return base


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
    if model.config.model_type not in NATIVE_MODEL_TYPES or type(model.lm_head) is not torch.nn.Linear:
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


def add_adapter(model: PreTrainedModel, config: Config, base: Path | None) -> PreTrainedModel:
    """The model with a new LoRA adapter on `lora_target_modules`, everything else frozen (arXiv 2106.09685).

    Raises:
        ModelError: a target that no module of the model is named after.
    """
    from peft import LoraConfig, get_peft_model

    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    unknown = [name for name in config.lora_target_modules if name.rpartition(".")[2] not in names]
    if unknown:
        linear = {
            name.rpartition(".")[2] for name, item in model.named_modules() if isinstance(item, torch.nn.Linear)
        }
        raise ModelError(
            f"lora_target_modules = {','.join(config.lora_target_modules)}: the model has no "
            f"{', '.join(unknown)}; it has {', '.join(sorted(linear))}"
        )
    parameters = _expert_parameters(model) if config.lora_on_experts else None
    # get_peft_model draws the adapter's first weights: seeded, or each run and rank begins elsewhere.
    torch.manual_seed(config.seed)
    alpha = int(config.lora_alpha) if float(config.lora_alpha).is_integer() else config.lora_alpha
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=config.lora_rank,
            lora_alpha=alpha,
            lora_dropout=config.lora_dropout,
            target_modules=list(config.lora_target_modules),
            target_parameters=parameters,
            task_type="CAUSAL_LM",
        ),
    )
    if base is not None:
        adapted.peft_config["default"].base_model_name_or_path = str(base)
    return adapted


def _expert_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the fused experts' weights, as PEFT's `target_parameters` takes them."""
    found = {".".join(name.split(".")[-2:]) for name, _ in model.named_parameters() if ".experts." in name}
    fused = sorted(name for name in found if name.startswith("experts."))
    if not fused:
        raise ModelError("lora_on_experts: this model is dense, it has no experts; leave it off")
    return fused


def freeze_all_but_attention(model: PreTrainedModel) -> None:
    """Leaves the `self_attn` parameters alone trainable."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(".self_attn." in name)


def mark_moe_leaves(model: PreTrainedModel) -> None:
    """Makes ZeRO-3 gather each MoE block as a whole instead of expert by expert.

    Raises:
        ModelError: for a model without MoE blocks.
    """
    from deepspeed.utils import set_z3_leaf_modules

    model_type = model.config.model_type
    if model_type not in MOE_BLOCKS:
        raise ModelError(
            f"make_moe_param_leaf_module: hynb knows no MoE block of model_type {model_type}; leave it off"
        )
    module, name = MOE_BLOCKS[model_type]
    block = getattr(importlib.import_module(module), name)
    if not any(isinstance(item, block) for item in model.modules()):
        raise ModelError("make_moe_param_leaf_module: this model is dense, it has no experts; leave it off")
    set_z3_leaf_modules(model, [block])


def keep_untrained_routers(model: PreTrainedModel, base: Path, weights: dict[str, torch.Tensor]) -> None:
    """Puts the base's weights of routers that were not trained in the place of those that bf16 has rounded.

    Released models keep their routers in float32; DeepSpeed holds all weights in the dtype of the training.

    Args:
        weights: of the model, about to be saved; changed in place.
    """
    wanted = {
        f"{name}.{part}"
        for name, router in routers(model, model.config.model_type)
        for part, weight in router.named_parameters()
        if not weight.requires_grad
    }
    for path in sorted(base.glob("*.safetensors")) if wanted else ():
        with safe_open(path, "pt") as shard:
            for name in wanted & weights.keys() & set(shard.keys()):
                weights[name] = shard.get_tensor(name)


def carry_over(base: Path | None, tokenizer_folder: Path, checkpoint: Path) -> None:
    """Copies into a full checkpoint what the base folder held beside weights, for other software to read it.

    Args:
        base: the base folder; None for a random model, which has a tokenizer alone.
        tokenizer_folder: where the tokenizer came from; the same folder as a rule.
        checkpoint: a full checkpoint with its own config.json.
    """
    for folder in filter(None, (tokenizer_folder, base)):
        for item in sorted(folder.iterdir()):
            rewritten = any(item.match(pattern) for pattern in _REWRITTEN)
            if item.is_file() and not rewritten and item.name not in _TRAINING_FILES:
                shutil.copyfile(item, checkpoint / item.name)
    original = (read_json(base / "config.json") if base is not None else None) or {}
    # Switched off for the training alone.
    written = read_json(checkpoint / "config.json") | {"use_cache": original.get("use_cache", True)}
    kept = {"auto_map": original["auto_map"]} if "auto_map" in original else {}
    write_json(checkpoint / "config.json", written | kept)


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


def write_base_identity(base: Path | None, checkpoint: Path) -> None:
    """Writes beside an adapter which base it belongs to; a merge and a resume check it."""
    if base is not None:
        write_json(checkpoint / BASE_IDENTITY, base_identity(base))
