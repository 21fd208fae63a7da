"""The memory that a run and each ZeRO preset need, estimated from the model's config.json."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from hynb.cluster import Gpu, hostfile, this_machine
from hynb.config import Config, random_model_config
from hynb.errors import ConfigError, HynbError
from hynb.files import read_json, size_text
from hynb.plan import memory, zero
from hynb.runs import find_base
from hynb.widgets.table import Table

# Hunyuan's special tokens, which the tiktoken file does not contain.
_SPECIAL_TOKENS = 209


def preset_costs(config: Config) -> Table | str:
    """Memory of GPU and host and the size of a checkpoint, one row per preset; or why there is no estimate."""
    try:
        plans = memory.compare(_model_config(config), _workload(config))
    except HynbError as error:
        return f"No estimate of what each preset needs: {error}"
    gpu_bytes = min((gpu.memory_bytes for gpu in _gpus()), default=0)
    rows = [
        (
            plan.preset.name,
            size_text(plan.gpu_bytes) + (_fits(plan.gpu_bytes, gpu_bytes) if gpu_bytes else ""),
            size_text(plan.host_bytes),
            size_text(plan.disk_bytes),
            plan.preset.help,
        )
        for plan in plans
    ]
    names = [plan.preset.name for plan in plans]
    chosen = names.index(config.deepspeed) if config.deepspeed in names else None
    columns = ("preset", "each GPU", "host memory", "a checkpoint", "what it does")
    return Table(columns=columns, rows=rows, title=_title(config), chosen=chosen)


def memory_plan(config: Config) -> Table:
    """What the run needs on each GPU, by part, in host memory and on the disk, beside what this machine has."""
    if config.deepspeed not in zero.PRESETS:
        return _no_estimate(config, f"{config.deepspeed} is not one of the presets")
    try:
        plan = memory.estimate(_model_config(config), _workload(config), preset=config.deepspeed)
    except HynbError as error:
        return _no_estimate(config, str(error))
    machine = this_machine(config.output_dir)
    total = size_text(plan.gpu_bytes)
    if machine.gpus:
        total += _fits(plan.gpu_bytes, min(gpu.memory_bytes for gpu in machine.gpus))
    rows = [(name, size_text(size_bytes)) for name, size_bytes in plan.parts.items()]
    rows += [
        ("each GPU, in total", total),
        ("host memory", size_text(plan.host_bytes) + _fits(plan.host_bytes, machine.memory_bytes)),
        ("a checkpoint on the disk", size_text(plan.disk_bytes) + _fits(plan.disk_bytes, machine.disk_free_bytes)),
    ]
    note = "" if machine.gpus else " (for GPUs; on a CPU the same tensors are in host memory)"
    return Table(columns=("what", "size"), rows=rows, title=_title(config) + note, chosen=len(plan.parts))


def _no_estimate(config: Config, reason: str) -> Table:
    return Table(columns=("what", "value"), rows=[("memory", f"no estimate: {reason}")], title=_title(config))


def _model_config(config: Config) -> dict[str, Any]:
    """The content of config.json of the run's base model, or of the random model that its sizes describe.

    Raises:
        ConfigError: the folder has no config.json.
        ModelError: the base of the checkpoint to resume from is missing.
    """
    folder = find_base(config)
    if folder is None:
        return _random_model(config)
    found = read_json(folder / "config.json")
    if found is None:
        raise ConfigError(f"there is no config.json in {folder}")
    return found


def _random_model(config: Config) -> dict[str, Any]:
    return random_model_config(config) | {"vocab_size": config.vocab_size or _vocabulary_size(config)}


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


def _workload(config: Config) -> memory.Workload:
    """The parameters that memory depends on."""
    if config.hostfile is None:
        # num_processes may exceed the GPUs here: the plan may be for another machine.
        slots = [config.num_processes or len(_gpus()) or 1]
    else:
        slots = [host.slots for host in hostfile.read(config.hostfile)]
    return memory.Workload(
        world_size=sum(slots),
        gpus_per_host=max(slots),
        use_lora=config.use_lora,
        lora_rank=config.lora_rank,
        lora_target_modules=tuple(config.lora_target_modules),
        train_attention_params_only=config.train_attention_params_only,
        micro_batch_size=config.per_device_train_batch_size,
        max_seq_length=config.max_seq_length,
        gradient_checkpointing=config.gradient_checkpointing,
        make_moe_param_leaf_module=config.make_moe_param_leaf_module,
        weight_bytes=2 if config.bf16 or config.fp16 else 4,
    )


@functools.cache
def _gpus() -> tuple[Gpu, ...]:
    """The GPUs of this machine; cached, because nvidia-smi can take a second and the form needs them at every key."""
    return this_machine().gpus


def _title(config: Config) -> str:
    method = f"LoRA of rank {config.lora_rank}" if config.use_lora else "full fine-tuning"
    model = Path(config.model_name_or_path).name if config.model_name_or_path else "a random model"
    return f"Estimated memory: {model}, {method}, {config.max_seq_length} tokens"


def _fits(needed_bytes: int, available_bytes: int) -> str:
    verdict = "fits into" if needed_bytes <= available_bytes else "more than"
    return f" ({verdict} the {size_text(available_bytes)} here)"
