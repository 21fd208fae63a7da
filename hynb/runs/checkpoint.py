"""Checkpoints: which one a run resumes from, whether it can, and which base it belongs to."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from hynb.config import Config
from hynb.errors import ModelError
from hynb.files import read_json
from hynb.runs.folder import RunDir

# Beside a checkpoint's weights: how it was made, which a resume has to repeat.
CHECKPOINT_RECORD = "hynb_checkpoint.json"
# Beside an adapter's weights: which base it belongs to.
BASE_IDENTITY = "base_identity.json"


def resume_checkpoint(config: Config) -> Path | None:
    """The checkpoint folder that a Config names; None when it names none, or 'last' and there is none."""
    if config.resume_from_checkpoint is None:
        return None
    if config.resume_from_checkpoint == "last":
        found = RunDir(config.output_dir).checkpoints()
        return found[-1] if found else None
    return Path(config.resume_from_checkpoint).expanduser().absolute()


def check_checkpoint(folder: Path) -> list[str]:
    """Why training cannot go on from a folder; empty when it can."""
    name = f"resume_from_checkpoint = {folder}"
    if not folder.is_dir():
        beside = ", ".join(item.name for item in RunDir(folder.parent).checkpoints())
        return [f"{name}: there is no such folder" + (f"; beside it there are: {beside}" if beside else "")]
    if not (folder / "trainer_state.json").is_file():
        inside = RunDir(folder).checkpoints()
        hint = f"; did you mean {inside[-1]}?" if inside else ""
        return [f"{name}: has no trainer_state.json, so it is no checkpoint{hint}"]
    if not list(folder.glob("global_step*")):
        return [
            f"{name}: holds weights but no optimizer state (saved with save_only_model). Start a new run "
            "with model_name_or_path set to it"
        ]
    return []


def check_same_shape(folder: Path, *, world_size: int, zero_stage: int, use_lora: bool) -> list[str]:
    """What differs between the run that saved a checkpoint and the one that would resume it."""
    record = read_json(folder / CHECKPOINT_RECORD)
    if record is None:
        return []
    now = {"world_size": world_size, "zero_stage": zero_stage, "use_lora": use_lora}
    hints = {
        "world_size": "resume with as many ranks",
        "zero_stage": "resume with a preset of that stage",
        "use_lora": "resume with the same use_lora",
    }
    return [
        f"{folder}: was saved with {name} = {record[name]}, this run has {value}: {hints[name]}"
        for name, value in now.items()
        if name in record and record[name] != value
    ]


def base_identity(folder: Path) -> dict[str, Any]:
    """What tells one base model from another without reading its weights.

    Returns:
        path, bytes of its weights, and a hash over config.json, shard names, sizes and safetensors headers.
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


def find_base(config: Config) -> Path | None:
    """The folder whose weights the run begins with; None for a random model.

    A resumed run without `model_name_or_path` finds it in the checkpoint: a LoRA checkpoint names its base,
    a full one is its own.

    Raises:
        ModelError: the base that a LoRA checkpoint names is not there, or another one was given.
    """
    given = Path(config.model_name_or_path).expanduser().absolute() if config.model_name_or_path else None
    checkpoint = resume_checkpoint(config)
    if checkpoint is None:
        return given
    adapter = read_json(checkpoint / "adapter_config.json")
    if adapter is None:
        return checkpoint
    base = given or Path(adapter.get("base_model_name_or_path") or "")
    if not (base / "config.json").is_file():
        raise ModelError(
            f"{checkpoint}: is an adapter for the base {base}, which is not there. "
            "Name the base's new place with model_name_or_path"
        )
    recorded = read_json(checkpoint / BASE_IDENTITY)
    if recorded is not None and recorded["hash"] != base_identity(base)["hash"]:
        raise ModelError(
            f"{checkpoint}: was trained on another base than {base} (config or weights differ). "
            f"Its base was {recorded['path']}"
        )
    return base
