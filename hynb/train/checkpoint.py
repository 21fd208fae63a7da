"""What a saved checkpoint holds beside the Trainer's own files."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hynb.families import FAMILIES
from hynb.files import read_json, write_json
from hynb.merge import INDEX_NAME, TensorEntry, copy_tensors, read_shard, read_tensor
from hynb.runs import BASE_IDENTITY, CHECKPOINT_RECORD, base_identity
from hynb.train.router_statistics import routers

logger = logging.getLogger(__name__)

# Files of a base folder that a full checkpoint writes itself; all others are copied.
_REWRITTEN = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt")
# Files that a checkpoint has beside the model's: a checkpoint of a resumed run writes its own.
_TRAINING_FILES = ("trainer_state.json", "latest", "zero_to_fp32.py", CHECKPOINT_RECORD, BASE_IDENTITY)
# The name of the model's only shard once it has another beside it, because transformers reads model.safetensors as
# the whole model; and the name of the other.
_FIRST_SHARD, _MTP_SHARD = "model-base.safetensors", "model-mtp.safetensors"


def restore_base_tensors(model: PreTrainedModel, base: Path, weights: dict[str, torch.Tensor]) -> None:
    """Gives back what training in a lower precision took from tensors that the base has in float32.

    Released models have float32 routers, and hy_v3 a float32 bias by which experts are chosen, beside bfloat16
    weights. DeepSpeed rounds all weights to the training's dtype. Those tensors are saved in float32 as in the base,
    and with the base's own values where they were not trained. Untrained routers are the base's in any dtype.

    Args:
        weights: the model's, about to be saved; changed in place.
    """
    tensors = {entry.name: entry for entry in _base_tensors(base)}
    float32 = _float32_beside_lower(tensors.values())
    family = FAMILIES.get(model.config.model_type)
    parameters = dict(model.named_parameters())
    of_routers = {
        f"{name}.{part}"
        for name, router in routers(model, model.config.model_type)
        for part, _ in router.named_parameters()
    }
    for name, weight in weights.items():
        entry = tensors.get(family.stored_name(name) if family else name)
        if entry is None or not (entry.name in float32 or name in of_routers):
            continue
        if name in parameters and parameters[name].requires_grad:
            weights[name] = weight.float() if entry.name in float32 else weight
        else:
            weights[name] = read_tensor(entry)


def mtp_tensors(base: Path) -> list[TensorEntry]:
    """The tensors of a base's MTP layers, which transformers does not load and a full checkpoint gets unchanged."""
    model_config = read_json(base / "config.json") or {}
    family = FAMILIES.get(model_config.get("model_type") or "")
    if family is None or not family.mtp_layers or not model_config.get(family.mtp_layers):
        return []
    found = [entry for entry in _base_tensors(base) if family.is_mtp_tensor(entry.name, model_config)]
    if not found:
        logger.info(
            f"{base}: config.json has {family.mtp_layers} = {model_config[family.mtp_layers]}, but the safetensors "
            "files have no tensors of MTP layers, so checkpoints will have none either"
        )
    return found


def add_tensors(tensors: Sequence[TensorEntry], checkpoint: Path) -> None:
    """Adds unchanged tensors of the base to a full checkpoint, as a shard of their own that its index lists.

    Args:
        checkpoint: with the model's own shards.
    """
    if not tensors:
        return
    index = read_json(checkpoint / INDEX_NAME)
    if index is None:
        (checkpoint / "model.safetensors").rename(checkpoint / _FIRST_SHARD)
        first = read_shard(checkpoint / _FIRST_SHARD).tensors
        total_bytes = sum(entry.size_bytes for entry in first)
        weight_map = {entry.name: _FIRST_SHARD for entry in first}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    copy_tensors(tensors, checkpoint / _MTP_SHARD)
    index["metadata"] = {"total_size": index["metadata"]["total_size"] + sum(item.size_bytes for item in tensors)}
    index["weight_map"] = dict(sorted((index["weight_map"] | {item.name: _MTP_SHARD for item in tensors}).items()))
    write_json(checkpoint / INDEX_NAME, index)


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


def _base_tensors(base: Path) -> list[TensorEntry]:
    """The tensors of a base; empty if its weights are not in safetensors files."""
    index = read_json(base / INDEX_NAME)
    names = sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]
    return [entry for name in names if (base / name).is_file() for entry in read_shard(base / name).tensors]


def _float32_beside_lower(tensors: Iterable[TensorEntry]) -> set[str]:
    """Names of the float32 tensors of a model most of whose bytes have another dtype."""
    sizes: Counter[str] = Counter()
    names = set()
    for entry in tensors:
        sizes[entry.dtype] += entry.size_bytes
        if entry.dtype == "F32":
            names.add(entry.name)
    return names if sizes and sizes.most_common(1)[0][0] != "F32" else set()
