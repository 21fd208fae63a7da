"""Which parameters are trained: a LoRA adapter, or the attention alone."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    PreTrainedModel,
)

from hynb.config import Config
from hynb.errors import ModelError


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
