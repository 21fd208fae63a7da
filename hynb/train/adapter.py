"""Which parameters are trained: a LoRA adapter, or the attention alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from hynb.config import Config
from hynb.errors import ModelError
from hynb.merge import TensorEntry
from hynb.train.router_precision import compute_routers_in_float32, keep_frozen_routers

logger = logging.getLogger(__name__)


def choose_trained_parameters(
    config: Config, model: PreTrainedModel, base: Path | None, stored: Sequence[TensorEntry]
) -> PreTrainedModel | PeftModel:
    """The model with what a Config trains of it: an adapter, the attention alone, or all.

    Args:
        base: the folder that the model was loaded from; None for a random one.
        stored: the tensors of the base; untrained routers keep those of them that are float32.

    Raises:
        ModelError: no module of the model has the name of a target.
    """
    compute_routers_in_float32(model)
    if config.use_lora:
        model.requires_grad_(False)
    elif config.train_attention_params_only:
        freeze_all_but_attention(model)
    adapted = config.lora_target_modules if config.use_lora else ()
    rounded = stored if config.bf16 or config.fp16 else []
    if kept := keep_frozen_routers(model, rounded, adapted=adapted):
        logger.info(f"{len(kept)} routers, which are not trained, keep the base's float32 weights")
    if config.use_lora:
        # A frozen embedding's output needs a gradient, or checkpointed layers would have none to pass back.
        if config.gradient_checkpointing:
            model.enable_input_require_grads()
        return add_adapter(model, config, base)
    return model


def add_adapter(model: PreTrainedModel, config: Config, base: Path | None) -> PeftModel:
    """The model with a new LoRA adapter on `lora_target_modules`, everything else frozen (arXiv 2106.09685).

    Under every preset the adapter has the dtype of the weights beside it, and DeepSpeed's optimizer a float32 copy of
    it, which the steps change. PEFT's own default is float32, which DeepSpeed undoes under ZeRO-2 alone.

    Args:
        base: the folder that the adapter's settings name as its base.

    Raises:
        ModelError: no module of the model has the name of a target.
    """
    _check_targets(model, config.lora_target_modules)
    parameters = _expert_parameters(model) if config.lora_on_experts else None
    # get_peft_model draws the initial weights: without a seed each run and rank would begin with others.
    torch.manual_seed(config.seed)
    alpha = int(config.lora_alpha) if float(config.lora_alpha).is_integer() else config.lora_alpha
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  PEFT computes with fractions too
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_target_modules),
        target_parameters=parameters,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ModelError(f"lora_target_modules = {','.join(config.lora_target_modules)}: {error}") from None
    assert isinstance(adapted, PeftModel)
    created = adapted.peft_config["default"]
    assert isinstance(created, LoraConfig)
    moved = sorted(set(created.target_parameters or ()) - set(parameters or ()))
    if moved:
        logger.info(
            f"lora_target_modules: of a {model.config.model_type} PEFT puts the adapters for the MLPs on all routed "
            f"experts ({', '.join(moved)}) and none on the shared MLP, which takes far more memory"
        )
    if base is not None:
        adapted.peft_config["default"].base_model_name_or_path = str(base)
    return adapted


def freeze_all_but_attention(model: PreTrainedModel) -> None:
    """Leaves only the `self_attn` parameters trainable."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(".self_attn." in name)


def _check_targets(model: PreTrainedModel, targets: list[str]) -> None:
    modules = {name.rpartition(".")[2]: module for name, module in model.named_modules()}
    unknown = [name for name in targets if name.rpartition(".")[2] not in modules]
    if unknown:
        linear = sorted(name for name, module in modules.items() if isinstance(module, torch.nn.Linear))
        raise ModelError(
            f"lora_target_modules = {','.join(targets)}: the model has no {', '.join(unknown)}; "
            f"it has {', '.join(linear)}"
        )


def _expert_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the fused experts' weights, as PEFT's `target_parameters` takes them."""
    endings = {".".join(name.split(".")[-2:]) for name, _ in model.named_parameters() if ".experts." in name}
    fused = sorted(name for name in endings if name.startswith("experts."))
    if not fused:
        raise ModelError("lora_on_experts: this model is dense, it has no experts; leave lora_on_experts out")
    return fused
