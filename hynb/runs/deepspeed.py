"""What a run's DeepSpeed config depends on besides its parameters: the model's sizes and the number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hynb.cluster import hostfile
from hynb.config import Config, random_model_config
from hynb.errors import ConfigError, HynbError
from hynb.files import read_json
from hynb.plan import limits, memory, zero
from hynb.runs.checkpoint import find_base

# Hunyuan's special tokens, which the tiktoken file does not contain.
_SPECIAL_TOKENS = 209


def with_derived_limits(
    config: Config, ds_config: dict[str, Any], workload: memory.Workload, gpu_bytes: int | None
) -> tuple[dict[str, Any], str]:
    """The DeepSpeed config of a run with the limits of ZeRO-3 for its model, and a note; unchanged where none apply.

    Args:
        ds_config: of `config.deepspeed`.
        gpu_bytes: memory of the smallest GPU of all ranks, which have to agree; None where it is unknown.
    """
    preset = zero.preset_of(config.deepspeed)
    if preset is None or not limits.are_derived(preset):
        return ds_config, ""
    try:
        found = limits.limits_of(model_config(config), workload, preset=preset.name, gpu_bytes=gpu_bytes)
    except HynbError as error:
        note = (
            f"deepspeed = {config.deepspeed}: DeepSpeed's own limits are used, because the model's sizes are unknown"
        )
        return ds_config, f"{note}: {error}"
    ds_config, note = limits.with_limits(ds_config, found)
    return ds_config, f"deepspeed = {config.deepspeed}: {note}"


def workload(config: Config, slots: list[int]) -> memory.Workload:
    """The parameters that memory depends on.

    Args:
        slots: number of ranks on each host.
    """
    return memory.Workload(
        world_size=sum(slots),
        gpus_per_host=max(slots),
        use_lora=config.use_lora,
        lora_rank=config.lora_rank,
        lora_target_modules=tuple(config.lora_target_modules),
        lora_on_experts=config.lora_on_experts,
        train_attention_params_only=config.train_attention_params_only,
        micro_batch_size=config.per_device_train_batch_size,
        max_seq_length=config.max_seq_length,
        sequence_parallel_size=config.sequence_parallel_size,
        gradient_checkpointing=config.gradient_checkpointing,
        make_moe_param_leaf_module=config.make_moe_param_leaf_module,
        weight_bytes=2 if config.bf16 or config.fp16 else 4,
    )


def planned_slots(config: Config, gpus: int) -> list[int]:
    """The number of ranks on each host before a run starts.

    Args:
        gpus: of this machine.

    Raises:
        ClusterError: the hostfile cannot be read.
    """
    if config.hostfile is None:
        # num_processes may exceed the GPUs here: the plan may be for another machine.
        return [config.num_processes or gpus or 1]
    return [host.slots for host in hostfile.read(config.hostfile)]


def model_config(config: Config) -> dict[str, Any]:
    """The content of config.json of the run's base model, or of the random model that its sizes describe.

    Raises:
        ConfigError: the folder has no config.json.
        ModelError: the base of the checkpoint to resume from is missing.
    """
    folder = find_base(config)
    if folder is None:
        return random_model_config(config) | {"vocab_size": config.vocab_size or _vocabulary_size(config)}
    found = read_json(folder / "config.json")
    if found is None:
        raise ConfigError(f"there is no config.json in {folder}")
    return found


def _vocabulary_size(config: Config) -> int:
    """The number of the tokenizer's tokens, counted in its files, because the kernel does not import transformers."""
    folder = Path(config.tokenizer_name_or_path or "").expanduser()
    if (folder / "hy.tiktoken").is_file():
        with (folder / "hy.tiktoken").open("rb") as file:
            return sum(1 for _ in file) + _SPECIAL_TOKENS
    if (folder / "tokenizer.json").is_file():
        found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return len(found["model"]["vocab"]) + len(found.get("added_tokens", []))
    raise ConfigError(f"there is no tokenizer in {folder}")
