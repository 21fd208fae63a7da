"""The defaults of upstream's training script, for a command line that leaves flags out.

They are those of the dataclasses in train/train.py of Tencent-Hunyuan-Large (Hunyuan-A13B, Hunyuan-7B, Hy-MT2 and Hy3
have the same) and, for flags that are transformers' own, of its TrainingArguments.
"""

from __future__ import annotations

from typing import Any

from hynb.config.parameter import value_text
from hynb.config.reading import Reading
from hynb.config.schema import SCHEDULERS_WITH_MIN_LR, parameter

# Of parameters that change what is trained.
_TRAINING = {
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "per_device_train_batch_size": 8,
}
_LORA = {"lora_alpha": 8.0, "lora_dropout": 0.0}
_RANDOM_MODEL = {"num_experts": 8, "tie_word_embeddings": True}
_TOP_K = 4
_HY3_FLAGS = {"moe_intermediate_size": 1536, "moe_layer_num_skipped": 1}


def use_upstream_defaults(reading: Reading) -> None:
    """Gives the flags that were left out the defaults of upstream's script, with a note on each other value.

    A default that is without effect in this run, such as LoRA's in full fine-tuning, is not mentioned.
    """
    values = reading.values
    defaults: dict[str, Any] = dict(_TRAINING)
    if not values.get("max_steps"):
        defaults["num_train_epochs"] = 3.0
    if values.get("use_lora"):
        defaults |= _LORA
    if _is_random(values):
        defaults |= _RANDOM_MODEL | (_HY3_FLAGS if values.keys() & _HY3_FLAGS else {})
        # Upstream's 4 fails where there are fewer experts.
        defaults["moe_topk"] = min(_TOP_K, values.get("num_experts", _RANDOM_MODEL["num_experts"]))
    reading.defaults = {name: value for name, value in defaults.items() if name not in values}
    if reading.defaults:
        texts = (
            f"{name} = {value_text(value)} (hynb's own: {parameter(name).default_text})"
            for name, value in reading.defaults.items()
        )
        reading.notes.append(f"flags that were left out have the defaults of upstream's script: {', '.join(texts)}")
    if kept := _kept(values, values | reading.defaults):
        reading.notes.append(f"left out, and different from upstream's script: {'; '.join(kept)}")


def _is_random(values: dict[str, Any]) -> bool:
    return not values.get("model_name_or_path") and not values.get("resume_from_checkpoint")


def _kept(given: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """The parameters that keep hynb's default, each with upstream's and the reason."""
    kept = {
        "deepspeed": "upstream trains without DeepSpeed, with the same result and more memory",
        "logging_steps": "upstream has 500, and no curve before that; training is the same",
    }
    if values["lr_scheduler_type"] in SCHEDULERS_WITH_MIN_LR:
        kept["min_lr"] = "a tenth of learning_rate; upstream's 0.01 is above most learning rates, which would rise"
    if _is_random(given) and "num_attention_heads" in given:
        kept["num_key_value_heads"] = "as many as query heads; upstream has 16"
    return [
        f"{name} = {parameter(name).default_text} ({reason})" for name, reason in kept.items() if name not in given
    ]
