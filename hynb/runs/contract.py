"""What a checkpoint was made with, and what of it a resumed run may change."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from hynb.config import Config, parameters
from hynb.runs.integrity import CHECKPOINT_RECORD
from hynb.runs.records import read_record

# The name of the training data's hash among the parameters; in allow_changed too.
DATA = "data"
_GROUPS = ("data", "lora", "zero", "schedule")
# Another check compares it.
_SHAPE = ("use_lora", "sequence_parallel_size")
_OTHER_TENSORS = "the states in the checkpoint are of other weights; start a new run from this model"
_OTHER_PRECISION = "the states in the checkpoint have the other precision"
# Why a parameter cannot be changed at all.
_FIXED = {
    "lora_rank": _OTHER_TENSORS,
    "lora_target_modules": _OTHER_TENSORS,
    "lora_on_experts": _OTHER_TENSORS,
    "train_attention_params_only": _OTHER_TENSORS,
    "bf16": _OTHER_PRECISION,
    "fp16": _OTHER_PRECISION,
    "training_args": "it is not known which of them a checkpoint restores",
}
# What leaves the training as it is, but for the last digit.
_HARMLESS = frozenset(
    (
        *("deepspeed", "gradient_checkpointing", "make_moe_param_leaf_module", "dataloader_num_workers"),
        *("train_data_file", "eval_data_file", "eval_steps", "on_bad_sample", "max_cut_share"),
        *("allow_ignored_fields", "versions"),
    )
)
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
_PACKAGES = ("hynb", "torch", "transformers", "deepspeed", "peft", "accelerate")


def made_with(config: Config, data_hash: str) -> dict[str, Any]:
    """What a checkpoint of a run records, and a run that is resumed from it is compared with."""
    values = {
        item.name: getattr(config, item.name)
        for item in parameters()
        if item.group in _GROUPS and item.name not in _SHAPE
    }
    values |= {"training_args": config.training_args, DATA: data_hash}
    return values | {"versions": {name: metadata.version(name) for name in _PACKAGES}}


def compare(
    folder: Path, now: Mapping[str, Any], allowed: list[str], *, samples: tuple[int, int] | None = None
) -> tuple[list[str], list[str], list[str]]:
    """How a run differs from the one that saved a checkpoint.

    Args:
        now: of this run, as from `made_with`; what it lacks is not compared.
        allowed: names whose change the user allows.
        samples: the global batch size of the checkpoint and of this run; None where it is not known yet.

    Returns:
        Notes on what differs and is harmless or allowed, the reasons to refuse the run, and the names that the run
        is to change.

    Raises:
        RunError: the checkpoint's record is damaged.
    """
    before = (read_record(folder / CHECKPOINT_RECORD) or {}).get("made_with")
    if not before:
        return [f"{folder}: does not say what it was made with, so nothing is compared"], [], []
    notes: list[str] = []
    refused: list[str] = []
    changed: list[str] = []
    for name in before.keys() & now.keys():
        if before[name] == now[name]:
            continue
        text = f"{name} = {_shown(now[name])}, in the run that saved {folder.name} {_shown(before[name])}"
        if name in _HARMLESS:
            notes.append(f"{text}: harmless")
        elif name in _FIXED:
            refused.append(f"{text}: cannot be changed: {_FIXED[name]}")
        elif name in BATCH and samples and samples[0] != samples[1]:
            refused.append(
                f"{text}: the global batch would be {samples[1]} samples instead of {samples[0]}, and the position "
                "in the data another one; choose both so that their product stays the same"
            )
        elif name not in allowed:
            refused.append(f"{text}: set it back, or allow the change with allow_changed: {name}")
        else:
            notes.append(f"{text}: allowed by allow_changed")
            changed.append(name)
    return sorted(notes), sorted(refused), sorted(changed)


def allowable_names() -> list[str]:
    """What allow_changed may name."""
    fixed = {*_FIXED, *_SHAPE, *_HARMLESS}
    names = [item.name for item in parameters() if item.group in _GROUPS and item.name not in fixed]
    return [*names, DATA]


def _shown(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 120 else f"{text[:117]}…"
