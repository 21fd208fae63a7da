"""What a saved checkpoint holds beside the Trainer's own files."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from hynb.files import read_json, write_json
from hynb.runs import BASE_IDENTITY, CHECKPOINT_RECORD, base_identity
from hynb.train.router_statistics import routers

# Files of a base folder that a full checkpoint writes itself; all others are copied.
_REWRITTEN = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt")
# Files that a checkpoint has beside the model's: a checkpoint of a resumed run writes its own.
_TRAINING_FILES = ("trainer_state.json", "latest", "zero_to_fp32.py", CHECKPOINT_RECORD, BASE_IDENTITY)


def restore_untrained_routers(
    model: nn.Module, model_type: str, base: Path, weights: dict[str, torch.Tensor]
) -> None:
    """Replaces the weights of routers that were not trained by those of the base.

    Released models have float32 routers; DeepSpeed rounds all weights to the training's dtype.

    Args:
        weights: the model's, about to be saved; changed in place.
    """
    wanted = {
        f"{name}.{part}"
        for name, router in routers(model, model_type)
        for part, weight in router.named_parameters()
        if not weight.requires_grad
    }
    for path in sorted(base.glob("*.safetensors")) if wanted else ():
        with safe_open(path, "pt") as shard:
            for name in wanted & weights.keys() & set(shard.keys()):
                weights[name] = shard.get_tensor(name)


def copy_model_files(base: Path | None, tokenizer_folder: Path, checkpoint: Path) -> None:
    """Copies what the base folder holds beside its weights into a full checkpoint, so that other software reads it.

    Args:
        base: the base folder; None for a random model, which has only a tokenizer.
        tokenizer_folder: where the tokenizer was loaded from; usually the base folder.
        checkpoint: a full checkpoint with its own config.json.
    """
    for folder in filter(None, (tokenizer_folder, base)):
        for item in sorted(folder.iterdir()):
            rewritten = any(item.match(pattern) for pattern in _REWRITTEN)
            if item.is_file() and not rewritten and item.name not in _TRAINING_FILES:
                shutil.copyfile(item, checkpoint / item.name)
    base_config = (read_json(base / "config.json") if base is not None else None) or {}
    written = read_json(checkpoint / "config.json")
    assert written is not None
    # use_cache was switched off for the training only.
    written |= {"use_cache": base_config.get("use_cache", True)}
    code = {"auto_map": base_config["auto_map"]} if "auto_map" in base_config else {}
    write_json(checkpoint / "config.json", written | code)


def write_base_identity(base: Path | None, checkpoint: Path) -> None:
    """Records the identity of an adapter's base in its checkpoint; a merge and a resume check it."""
    if base is not None:
        write_json(checkpoint / BASE_IDENTITY, base_identity(base))
