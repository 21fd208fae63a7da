"""transformers' TrainingArguments of a Config."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from transformers import TrainingArguments

from hynb.config import SCHEDULERS_WITH_MIN_LR, Config
from hynb.errors import ConfigError
from hynb.runs import RunDir

logger = logging.getLogger(__name__)


def training_arguments(
    config: Config, ds_config: dict[str, Any], *, evaluates: bool, workers: int = 0
) -> TrainingArguments:
    """The TrainingArguments of a Config. ZeRO-3 shards every model that is created while they exist.

    Args:
        ds_config: DeepSpeed's settings.
        evaluates: whether there is an evaluation set.
        workers: processes of this rank that read batches ahead.

    Raises:
        ConfigError: TrainingArguments refuses a value of `training_args`.
    """
    on_gpu = torch.cuda.is_available()
    values = {
        "output_dir": config.output_dir,
        "deepspeed": ds_config,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "activation_checkpointing": config.gradient_checkpointing,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "lr_scheduler_kwargs": scheduler_options(config),
        # transformers reads a value below 1 as a share of all steps.
        "warmup_steps": config.warmup_ratio,
        # transformers' own notation for "from num_train_epochs" is -1.
        "max_steps": config.max_steps or -1,
        "num_train_epochs": config.num_train_epochs,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "bf16": config.bf16,
        "fp16": config.fp16,
        "logging_steps": config.logging_steps,
        "save_strategy": config.save_strategy,
        "save_steps": config.save_steps,
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "use_cpu": not on_gpu,
        "report_to": ["tensorboard"],
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": on_gpu,
        "dataloader_num_workers": workers,
        # Otherwise each epoch and evaluation would start them again.
        "dataloader_persistent_workers": workers > 0,
    }
    if evaluates:
        values |= {"eval_strategy": "steps", "eval_steps": config.eval_steps or config.save_steps}
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(RunDir(config.output_dir).tensorboard)
    try:
        return TrainingArguments(**(values | config.training_args))
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{name}={value}" for name, value in config.training_args.items())
        raise ConfigError(f"TrainingArguments: {error} (given beside hynb's own: {given or 'none'})") from error


def scheduler_options(config: Config) -> dict[str, float]:
    """The options of the chosen scheduler: transformers takes the lowest rate as a share of the highest."""
    if config.lr_scheduler_type not in SCHEDULERS_WITH_MIN_LR:
        if config.min_lr is not None:
            logger.info(f"min_lr is not used: lr_scheduler_type {config.lr_scheduler_type} has no lowest rate")
        return {}
    if config.min_lr is None:
        logger.info(f"min_lr: {config.learning_rate / 10:g}, a tenth of learning_rate, because none was given")
        return {"min_lr_rate": 0.1}
    return {"min_lr_rate": config.min_lr / config.learning_rate}
