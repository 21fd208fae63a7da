"""What is wrong with a Config on this machine before anything starts: paths, settings, run folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from pathlib import Path
from typing import Any

from hynb import zero
from hynb.config import Config
from hynb.data_read import find_files
from hynb.errors import ConfigError, HynbError
from hynb.run_dir import RunDir, check_output_dir, read_json

# Families whose code is in hynb or in transformers: code inside their folders is never needed.
NATIVE_MODEL_TYPES = ("hunyuan", "hunyuan_v1_moe", "hunyuan_v1_dense", "hy_v3")
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = ("tokenizer.json", "hy.tiktoken", "tokenizer.model", "vocab.json")
# Beside a checkpoint's weights: how it was made, which a resume has to repeat.
CHECKPOINT_RECORD = "hynb_checkpoint.json"
# Beside an adapter's weights: which base it belongs to.
BASE_IDENTITY = "base_identity.json"


def check_run(config: Config, *, launched: bool = False) -> None:
    """Looks at everything a run needs from the disk.

    Args:
        config: whose own values are already checked.
        launched: the run folder was prepared by `launch`, which has looked at it.

    Raises:
        ConfigError: every mistake found, at once.
    """
    problems = []
    resume = None
    if config.resume_from_checkpoint is not None:
        resume = resume_checkpoint(config)
        problems += check_checkpoint(resume) if resume else [_no_last_checkpoint(config)]
    if config.model_name_or_path is not None:
        problems += check_model_folder(config.model_name_or_path, config.trust_remote_code)
    if config.tokenizer_name_or_path is not None:
        problems += check_tokenizer_folder(config.tokenizer_name_or_path, "tokenizer_name_or_path")
    elif config.model_name_or_path is not None and Path(config.model_name_or_path).is_dir():
        problems += check_tokenizer_folder(config.model_name_or_path, "model_name_or_path")
    for parameter in ("train_data_file", "eval_data_file"):
        if (paths := getattr(config, parameter)) is not None:
            problems += _missing_files(paths, parameter)
    # Hosts that a run has reached need no hostfile of their own.
    if not launched and config.hostfile is not None and not Path(config.hostfile).is_file():
        problems.append(f"hostfile = {config.hostfile}: there is no such file")
    problems += check_deepspeed(config)
    if not launched:
        problems += check_output_dir(
            config.output_dir, overwrite=config.overwrite_output_dir, resuming=resume is not None
        )
        if config.overwrite_output_dir and resume and resume.parent == RunDir(config.output_dir).path:
            problems.append(
                "overwrite_output_dir and resume_from_checkpoint are both given, and the checkpoint lies in "
                "output_dir: it would be removed first. Leave out overwrite_output_dir"
            )
    if problems:
        raise ConfigError(problems)


def clear_run_folder(config: Config) -> None:
    """Removes what an earlier run left: all of its files on `overwrite_output_dir`, else its end marks."""
    run_dir = RunDir(config.output_dir)
    if config.overwrite_output_dir:
        for item in run_dir.run_files():
            shutil.rmtree(item) if item.is_dir() else item.unlink()
    ends = [run_dir.stop_request, run_dir.exit, run_dir.status, run_dir.heartbeat, run_dir.launch]
    ends += [run_dir.kill_request, run_dir.hosts, run_dir.paste]
    for item in [*ends, *run_dir.log.glob("failure_rank*.json")]:
        item.unlink(missing_ok=True)
    shutil.rmtree(run_dir.saving, ignore_errors=True)


def free_port() -> int:
    """A TCP port that is free now on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_model_folder(path: str, trust_remote_code: bool) -> list[str]:
    """Why a folder cannot be loaded as a model; empty when it can."""
    folder = Path(path)
    name = f"model_name_or_path = {path}"
    if not folder.is_dir():
        return [f"{name}: there is no such folder. Download the model first; hynb trains from a local folder"]
    try:
        model_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [f"{name}: has no config.json, so it is no model folder{_adapter_hint(folder)}"]
    except ValueError as error:
        return [f"{folder / 'config.json'}: no valid JSON: {error}. Download the file again"]
    problems = []
    if not any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES):
        problems.append(f"{name}: has a config.json but no weights (*.safetensors)")
    problems += _missing_shards(folder)
    model_type = model_config.get("model_type")
    if model_config.get("auto_map") and model_type not in NATIVE_MODEL_TYPES and not trust_remote_code:
        files = _code_files(model_config)
        problems.append(
            f"{name}: model_type {model_type} needs code from the folder itself ({', '.join(files)}). "
            "Read those files, then allow them with trust_remote_code: true"
        )
    if "quantization_config" in model_config:
        problems.append(f"{name}: is quantised; fine-tuning needs the bf16 or fp16 original")
    return problems


def check_tokenizer_folder(path: str, parameter: str) -> list[str]:
    """Why a folder cannot be loaded as a tokenizer; empty when it can."""
    folder = Path(path)
    if not folder.is_dir():
        return [f"{parameter} = {path}: there is no such folder"]
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return [
            f"{parameter} = {path}: has no tokenizer ({', '.join(TOKENIZER_FILES)}); "
            "name its folder with tokenizer_name_or_path"
        ]
    return []


def check_deepspeed(config: Config) -> list[str]:
    """What DeepSpeed would refuse in the chosen preset or file, and choices that contradict it."""
    try:
        ds_config = zero.load(config.deepspeed)
    except HynbError as error:
        return error.problems
    problems = []
    if config.deepspeed not in zero.PRESETS:
        problems += zero.check(ds_config, source=config.deepspeed)
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    if config.make_moe_param_leaf_module and stage != 3:
        problems.append(
            f"make_moe_param_leaf_module needs ZeRO-3, and deepspeed = {config.deepspeed} is stage {stage}: "
            "choose ds_zero3_no_offload or ds_zero3_offload, or leave it off"
        )
    return problems


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


def _missing_files(paths: str, parameter: str) -> list[str]:
    try:
        find_files(paths, parameter)
    except HynbError as error:
        return error.problems
    return []


def _no_last_checkpoint(config: Config) -> str:
    return (
        f"resume_from_checkpoint = last: there is no checkpoint in output_dir = {config.output_dir}. "
        "Leave it out to start from the beginning"
    )


def _adapter_hint(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "; it is a LoRA adapter: merge it first (`hynb merge`), or go on with resume_from_checkpoint"
    return ""


def _missing_shards(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        return [f"{index}: is no valid index ({error}). Download the file again"]
    missing = sorted(name for name in named if not (folder / name).is_file())
    if missing:
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        return [f"{folder}: {len(missing)} of {len(named)} shards are missing: {shown}. Finish the download"]
    return []


def _code_files(model_config: dict[str, Any]) -> list[str]:
    """The Python files that an auto_map of `file.Class` entries would run."""
    entries = model_config["auto_map"].values()
    names = [item for entry in entries for item in (entry if isinstance(entry, list) else [entry]) if item]
    return sorted({str(name).split("--")[-1].rpartition(".")[0] + ".py" for name in names})
