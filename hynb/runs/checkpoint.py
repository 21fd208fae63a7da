"""Checkpoints: which one a run resumes from, whether it can be resumed, and which base it belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

from hynb.config import Config
from hynb.errors import ModelError, RunError
from hynb.files import path_problem, pattern_problem, read_json
from hynb.runs.events import last_events
from hynb.runs.folder import RunDir
from hynb.runs.integrity import CHECKPOINT_RECORD, check_files, has_digests
from hynb.runs.records import read_record

# In an adapter's checkpoint: the identity of its base.
BASE_IDENTITY = "base_identity.json"
# PEFT's settings, in every adapter folder.
ADAPTER_CONFIG = "adapter_config.json"
# Of a base's weight files these are read for its identity: few enough for hundreds of shards on a network disk.
_WHOLE_BYTES, _SAMPLES, _SAMPLE_BYTES = 4 << 20, 64, 4096


def resume_checkpoint(config: Config) -> Path | None:
    """The checkpoint folder that a Config resumes from; None when it does not resume, or "last" finds none."""
    if config.resume_from_checkpoint is None:
        return None
    if config.resume_from_checkpoint == "last":
        return last_checkpoint(RunDir(config.output_dir))[0]
    return Path(config.resume_from_checkpoint).expanduser().absolute()


def last_checkpoint(run_dir: RunDir) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, by sizes and headers, and why each newer one is passed over."""
    skipped: list[str] = []
    for folder in reversed(run_dir.checkpoints()):
        problems = check_checkpoint(folder, trusted=True)
        if not problems:
            return folder, skipped
        skipped += problems
    return None, skipped


def resume_candidates(config: Config) -> list[Path]:
    """The checkpoints that a Config may resume from, the best one first: one, or for "last" all, newest first."""
    if config.resume_from_checkpoint == "last":
        return RunDir(config.output_dir).checkpoints()[::-1]
    found = resume_checkpoint(config)
    return [found] if found else []


def check_checkpoint(folder: Path, *, trusted: bool) -> list[str]:
    """Why training cannot resume from a folder, one message per reason; empty when it can.

    Args:
        trusted: go on where no digests prove that the files are what a run wrote.
    """
    name = f"resume_from_checkpoint = {folder}"
    if not folder.is_dir():
        present = ", ".join(item.name for item in RunDir(folder.parent).checkpoints())
        return [f"{name}: there is no such folder" + (f"; its parent folder has {present}" if present else "")]
    if problem := pattern_problem(folder):
        return [f"{name}: {problem}"]
    if problems := check_files(folder):
        return [f"{name}: is damaged: {problem}" for problem in problems]
    if not (folder / "trainer_state.json").is_file():
        inside = RunDir(folder).checkpoints()
        hint = f"; did you mean {inside[-1]}?" if inside else ""
        return [f"{name}: has no trainer_state.json, so it is not a checkpoint{hint}"]
    if not list(folder.glob("global_step*")):
        return [
            f"{name}: holds weights but no optimizer state (it was saved with save_only_model). Start a new run "
            "with model_name_or_path set to this folder"
        ]
    if not trusted and not has_digests(folder):
        return [
            f"{name}: has no {CHECKPOINT_RECORD} with the digests of its files, so nothing shows that a run of hynb "
            "wrote them. Resuming unpickles DeepSpeed's states, which runs whatever code is in them: if you know "
            "where the checkpoint comes from, allow it with trust_checkpoint: true"
        ]
    return []


def saved_step(folder: Path) -> tuple[int, int | None]:
    """The step of a checkpoint, and the last step that its run had planned; None where it is not recorded.

    Raises:
        RunError: its trainer_state.json is damaged.
    """
    state = read_json(folder / "trainer_state.json") or {}
    step, planned = state.get("global_step"), state.get("max_steps")
    if not isinstance(step, int):
        raise RunError(
            f"{folder / 'trainer_state.json'}: global_step = {step!r}: must be an integer; restore the file"
        )
    return step, planned if isinstance(planned, int) else None


def set_aside(run_dir: RunDir, resume: Path) -> list[Path]:
    """Moves the checkpoints of the branch that a resume leaves into a folder of their own.

    Otherwise `last` would mean one of them, and save_total_limit would remove the new ones first.

    Args:
        resume: the checkpoint that the run goes on from; all are moved if it is in another folder.

    Returns:
        The new paths; empty when there is nothing beyond `resume`.
    """
    step = saved_step(resume)[0]
    found = run_dir.checkpoints()
    if resume in found:
        found = [folder for folder in found if int(folder.name.rpartition("-")[2]) > step]
    if not found:
        return []
    number, target = 1, run_dir.abandoned / f"from-step-{step}"
    while target.exists():
        number += 1
        target = run_dir.abandoned / f"from-step-{step}-{number}"
    target.mkdir(parents=True)
    return [folder.rename(target / folder.name) for folder in found]


def ended_well(run_dir: RunDir) -> bool:
    """Whether the last run in a folder ended by itself; a crash may have damaged what it wrote shortly before."""
    events = last_events(run_dir.events)
    return not events or events[-1]["kind"] == "end"


def surplus_checkpoints(run_dir: RunDir, keep: int) -> list[Path]:
    """The checkpoints that save_total_limit removes: those that are older than the newest whole ones.

    Args:
        keep: the number of whole ones to keep.
    """
    kept = 0
    for place, folder in reversed(list(enumerate(found := run_dir.checkpoints()))):
        kept += not check_files(folder)
        if kept == keep:
            return found[:place]
    return []


def is_resharded(folder: Path, shape: Mapping[str, Any]) -> bool:
    """Whether a run has another number of ranks or another ZeRO stage than the one that saved a checkpoint."""
    record = read_record(folder / CHECKPOINT_RECORD) or {}
    return any(record.get(name, shape[name]) != shape[name] for name in ("world_size", "zero_stage"))


def check_same_shape(folder: Path, shape: Mapping[str, Any]) -> list[str]:
    """What differs between the run that saved a checkpoint and this one and cannot, one message per setting.

    The number of ranks and the stage may differ under ZeRO 1 to 3.

    Args:
        shape: of this run: world_size, zero_stage, use_lora and sequence_parallel_size.
    """
    record = read_record(folder / CHECKPOINT_RECORD)
    if record is None:
        return []
    # Checkpoints of runs that could not share a row.
    record = {"sequence_parallel_size": 1} | record
    hints = {
        "world_size": "without ZeRO, resume with the same number of ranks",
        "zero_stage": "resume with a preset of ZeRO 1 to 3 if the checkpoint is of one, otherwise of the same stage",
        "use_lora": "resume with the same use_lora",
        "sequence_parallel_size": "resume with the same sequence_parallel_size: the order of data depends on it",
    }
    if record.get("zero_stage") and shape.get("zero_stage"):
        del hints["world_size"], hints["zero_stage"]
    return [
        f"{folder}: was saved with {name} = {record[name]}, this run has {shape[name]}: {hint}"
        for name, hint in hints.items()
        if name in record and name in shape and record[name] != shape[name]
    ]


def base_identity(folder: Path) -> dict[str, Any]:
    """The identity of a base model, found without reading all of its weights.

    Returns:
        path, weight_bytes, hash: SHA-256 over config.json, shard names, shard sizes and safetensors headers, and
        values: SHA-256 over blocks of the weights, all of a small file and 64 blocks of 4 kB of a large one. Two
        models of one run differ in it, as do files of which a large part was changed; a few values may not show.
    """
    digest, values = hashlib.sha256((folder / "config.json").read_bytes()), hashlib.sha256()
    total_bytes = 0
    for shard in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        size_bytes = shard.stat().st_size
        total_bytes += size_bytes
        digest.update(f"{shard.name}:{size_bytes}\n".encode())
        with shard.open("rb", buffering=0) as file:
            if shard.suffix == ".safetensors":
                header_bytes = int.from_bytes(file.read(8), "little")
                digest.update(file.read(min(header_bytes, 64 << 20)))
            for start, count in _sampled_blocks(size_bytes):
                file.seek(start)
                values.update(file.read(count))
    identity = {"path": str(folder), "weight_bytes": total_bytes, "hash": digest.hexdigest()}
    return identity | {"values": values.hexdigest()}


def same_base(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two identities are of the same model; the values are compared where both have them."""
    return one["hash"] == other["hash"] and one.get("values", "") in ("", other.get("values", one.get("values", "")))


def _sampled_blocks(size_bytes: int) -> list[tuple[int, int]]:
    """Start and length of the blocks of a file that stand for its values."""
    if size_bytes <= _WHOLE_BYTES:
        return [(0, size_bytes)]
    last = size_bytes - _SAMPLE_BYTES
    return [(last * number // (_SAMPLES - 1), _SAMPLE_BYTES) for number in range(_SAMPLES)]


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
    named = adapter.get("base_model_name_or_path") or ""
    problem = path_problem(named) if isinstance(named, str) else "must be a string"
    if problem and given is None:
        shown = repr(named)[:200]
        raise ModelError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path = {shown}: {problem}; correct the file")
    base = given or Path(named)
    if not (base / "config.json").is_file():
        raise ModelError(
            f"{folder}: is an adapter for the base {base}, which is not there. Resume with model_name_or_path set to "
            f"the base's new path, or correct base_model_name_or_path in its {ADAPTER_CONFIG}"
        )
    recorded = read_record(folder / BASE_IDENTITY)
    if recorded is not None and not same_base(recorded, base_identity(base)):
        raise ModelError(
            f"{folder}: was trained on another base than {base} (config or weights differ). "
            f"Its base was {recorded['path']}"
        )
    return base
