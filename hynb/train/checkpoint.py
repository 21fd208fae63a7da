"""What a saved checkpoint holds beside the Trainer's own files."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hynb.families import FAMILIES
from hynb.files import read_json, read_weight_map, size_text, write_json
from hynb.merge import TensorEntry, read_shard
from hynb.runs import BASE_IDENTITY, CHECKPOINT_RECORD, base_identity

logger = logging.getLogger(__name__)

# Files of a base folder that a full checkpoint writes itself; all others are copied.
_REWRITTEN = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt")
# Files that a checkpoint has beside the model's: a checkpoint of a resumed run writes its own.
_TRAINING_FILES = ("trainer_state.json", "latest", "zero_to_fp32.py", CHECKPOINT_RECORD, BASE_IDENTITY)


def base_tensors(base: Path) -> list[TensorEntry]:
    """The tensors of a base; empty if its weights are not in safetensors files.

    Raises:
        ModelError: a file is truncated, corrupt or not a safetensors file.
    """
    weight_map = read_weight_map(base)
    names = sorted(set(weight_map.values())) if weight_map else ["model.safetensors"]
    return [entry for name in names if (base / name).is_file() for entry in read_shard(base / name).tensors]


def mtp_tensors(base: Path, stored: Sequence[TensorEntry]) -> list[TensorEntry]:
    """The tensors of a base's MTP layers, which transformers does not load and a full checkpoint gets unchanged.

    Args:
        stored: all tensors of the base, as from `base_tensors`.
    """
    model_config = read_json(base / "config.json") or {}
    family = FAMILIES.get(model_config.get("model_type") or "")
    if family is None or not family.mtp_layers or not model_config.get(family.mtp_layers):
        return []
    found = [entry for entry in stored if family.is_mtp_tensor(entry.name, model_config)]
    if not found:
        logger.info(
            f"{base}: config.json has {family.mtp_layers} = {model_config[family.mtp_layers]}, but the safetensors "
            "files have no tensors of MTP layers, so checkpoints will have none either"
        )
    return found


def tensors_to_copy(base: Path, stored: Sequence[TensorEntry]) -> list[TensorEntry]:
    """As `mtp_tensors`, which each full checkpoint gets from the base because the model has no such parameters."""
    copied = mtp_tensors(base, stored)
    if copied:
        size_bytes = sum(entry.size_bytes for entry in copied)
        logger.info(
            f"{len(copied)} tensors of MTP layers ({size_text(size_bytes)}) are not trained; each checkpoint gets "
            "them from the base unchanged"
        )
    return copied


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
    write_config(base, checkpoint)


def write_config(base: Path | None, checkpoint: Path) -> None:
    """Gives a full checkpoint the config.json of its base, with the dtype of the saved weights.

    transformers writes other keys than the base has, without those that it does not read; other software needs them.

    Args:
        base: the base folder; None for a random model, whose config.json is what transformers wrote.
        checkpoint: with the config.json that transformers wrote.
    """
    written = read_json(checkpoint / "config.json")
    assert written is not None
    base_config = read_json(base / "config.json") if base is not None else None
    if base_config is None:
        # It was switched off for the training only.
        kept: dict[str, Any] = written | {"use_cache": True}
    else:
        dtype = written.get("dtype") or written.get("torch_dtype")
        kept = base_config | {key: dtype for key in ("dtype", "torch_dtype") if key in base_config and dtype}
    write_json(checkpoint / "config.json", kept)


def write_base_identity(base: Path | None, checkpoint: Path) -> None:
    """Records the identity of an adapter's base in its checkpoint; a merge and a resume check it."""
    if base is not None:
        write_json(checkpoint / BASE_IDENTITY, base_identity(base))
