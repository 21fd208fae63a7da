"""What a saved checkpoint holds beside the Trainer's own files."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import (
    PreTrainedModel,
)

from hynb.files import read_json, write_json
from hynb.runs import BASE_IDENTITY, CHECKPOINT_RECORD, base_identity
from hynb.train.router_statistics import routers

# Files of a base folder that a full checkpoint writes itself; all others travel along.
_REWRITTEN = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt")
# What a checkpoint that is resumed from holds beside the model: the new checkpoint writes its own.
_TRAINING_FILES = ("trainer_state.json", "latest", "zero_to_fp32.py", CHECKPOINT_RECORD, BASE_IDENTITY)


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


def write_base_identity(base: Path | None, checkpoint: Path) -> None:
    """Writes beside an adapter which base it belongs to; a merge and a resume check it."""
    if base is not None:
        write_json(checkpoint / BASE_IDENTITY, base_identity(base))
