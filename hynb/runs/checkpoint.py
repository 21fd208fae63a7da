"""Checkpoints: which one a run resumes from, whether it can be resumed, and which base it belongs to."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, overload

from hynb.config import Config
from hynb.errors import ModelError
from hynb.files import read_json
from hynb.runs.folder import RunDir

# In a checkpoint: the world size, ZeRO stage and mode that saved it, which a resume must repeat.
CHECKPOINT_RECORD = "hynb_checkpoint.json"
# In an adapter's checkpoint: the identity of its base.
BASE_IDENTITY = "base_identity.json"
# PEFT's settings, in every adapter folder.
ADAPTER_CONFIG = "adapter_config.json"


def resume_checkpoint(config: Config) -> Path | None:
    """The checkpoint folder that a Config resumes from; None when it does not resume, or "last" finds none."""
    if config.resume_from_checkpoint is None:
        return None
    if config.resume_from_checkpoint == "last":
        found = RunDir(config.output_dir).checkpoints()
        return found[-1] if found else None
    return Path(config.resume_from_checkpoint).expanduser().absolute()


def check_checkpoint(folder: Path) -> list[str]:
    """Why training cannot resume from a folder, one message per reason; empty when it can."""
    name = f"resume_from_checkpoint = {folder}"
    if not folder.is_dir():
        present = ", ".join(item.name for item in RunDir(folder.parent).checkpoints())
        return [f"{name}: there is no such folder" + (f"; its parent folder has {present}" if present else "")]
    if not (folder / "trainer_state.json").is_file():
        inside = RunDir(folder).checkpoints()
        hint = f"; did you mean {inside[-1]}?" if inside else ""
        return [f"{name}: has no trainer_state.json, so it is not a checkpoint{hint}"]
    if not list(folder.glob("global_step*")):
        return [
            f"{name}: holds weights but no optimizer state (it was saved with save_only_model). Start a new run "
            "with model_name_or_path set to this folder"
        ]
    return []


def check_same_shape(
    folder: Path, *, world_size: int, zero_stage: int, use_lora: bool, sequence_parallel_size: int = 1
) -> list[str]:
    """The settings that differ between the run that saved a checkpoint and this one, one message per setting."""
    record = read_json(folder / CHECKPOINT_RECORD)
    if record is None:
        return []
    # Checkpoints of runs that could not share a row.
    record = {"sequence_parallel_size": 1} | record
    now = {"world_size": world_size, "zero_stage": zero_stage, "use_lora": use_lora}
    now["sequence_parallel_size"] = sequence_parallel_size
    hints = {
        "world_size": "resume with the same number of ranks",
        "zero_stage": "resume with a preset of the same stage",
        "use_lora": "resume with the same use_lora",
        "sequence_parallel_size": "resume with the same sequence_parallel_size, which decides the order of data",
    }
    return [
        f"{folder}: was saved with {name} = {record[name]}, this run has {value}: {hints[name]}"
        for name, value in now.items()
        if name in record and record[name] != value
    ]


def base_identity(folder: Path) -> dict[str, Any]:
    """The identity of a base model, found without reading its weights.

    Returns:
        path, weight_bytes, and hash: SHA-256 over config.json, shard names, shard sizes and safetensors headers.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    total_bytes = 0
    for shard in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        size_bytes = shard.stat().st_size
        total_bytes += size_bytes
        digest.update(f"{shard.name}:{size_bytes}\n".encode())
        if shard.suffix == ".safetensors":
            with shard.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                digest.update(file.read(min(header_bytes, 64 << 20)))
    return {"path": str(folder), "weight_bytes": total_bytes, "hash": digest.hexdigest()}


@overload
def find_base(source: Path) -> Path: ...


@overload
def find_base(source: Config) -> Path | None: ...


def find_base(source: Config | Path) -> Path | None:
    """The folder of the base weights that a run begins with, or that a checkpoint belongs to.

    A LoRA checkpoint names its base; a full checkpoint or a model folder is its own. A Config that resumes without
    `model_name_or_path` takes the base of its checkpoint.

    Args:
        source: a run's Config, or the folder of a checkpoint, an adapter or a model.

    Returns:
        The folder; None for a Config that begins with random weights.

    Raises:
        ModelError: the folder holds neither a model nor an adapter, or the base of an adapter is missing or is not
            the one that it was trained on.
    """
    if isinstance(source, Path):
        return _base_of_folder(source, None)
    given = Path(source.model_name_or_path).expanduser().absolute() if source.model_name_or_path else None
    checkpoint = resume_checkpoint(source)
    return given if checkpoint is None else _base_of_folder(checkpoint, given)


def _base_of_folder(folder: Path, given: Path | None) -> Path:
    """The base of a checkpoint; `given` replaces the path that an adapter names."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: there is no such folder")
    adapter = read_json(folder / ADAPTER_CONFIG)
    if adapter is None:
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder}: has neither config.json nor {ADAPTER_CONFIG}, so it is not a model folder")
        return folder
    base = given or Path(adapter.get("base_model_name_or_path") or "")
    if not (base / "config.json").is_file():
        raise ModelError(
            f"{folder}: is an adapter for the base {base}, which is not there. Resume with model_name_or_path set to "
            f"the base's new path, or correct base_model_name_or_path in its {ADAPTER_CONFIG}"
        )
    recorded = read_json(folder / BASE_IDENTITY)
    if recorded is not None and recorded["hash"] != base_identity(base)["hash"]:
        raise ModelError(
            f"{folder}: was trained on another base than {base} (config or weights differ). "
            f"Its base was {recorded['path']}"
        )
    return base
