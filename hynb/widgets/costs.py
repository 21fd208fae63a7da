"""The memory that a run and each ZeRO preset need, estimated from the model's config.json."""

from __future__ import annotations

import functools
from pathlib import Path

from hynb.cluster import Gpu, this_machine
from hynb.config import Config
from hynb.errors import HynbError
from hynb.files import size_text
from hynb.plan import memory, zero
from hynb.runs import model_config, planned_slots, workload
from hynb.widgets.table import Table


def preset_costs(config: Config) -> Table | str:
    """Memory of GPU and host and the size of a checkpoint, one row per preset; or why there is no estimate."""
    try:
        plans = memory.compare(model_config(config), _workload(config))
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
        plan = memory.estimate(model_config(config), _workload(config), preset=config.deepspeed)
    except HynbError as error:
        return _no_estimate(config, str(error))
    machine = this_machine(config.output_dir)
    total = size_text(plan.gpu_bytes)
    if machine.gpus:
        total += _fits(plan.gpu_bytes, min(gpu.memory_bytes for gpu in machine.gpus))
    rows = [(name, size_text(size_bytes)) for name, size_bytes in plan.parts.items()]
    in_host_memory = [
        (f"host memory: {name}", size_text(size_bytes)) for name, size_bytes in plan.host_parts.items() if size_bytes
    ]
    rows += [
        ("each GPU, in total", total),
        *in_host_memory,
        ("host memory", size_text(plan.host_bytes) + _fits(plan.host_bytes, machine.memory_bytes)),
        ("a checkpoint on the disk", size_text(plan.disk_bytes) + _fits(plan.disk_bytes, machine.disk_free_bytes)),
    ]
    note = "" if machine.gpus else " (for GPUs; on a CPU the same tensors are in host memory)"
    return Table(columns=("what", "size"), rows=rows, title=_title(config) + note, chosen=len(plan.parts))


def _no_estimate(config: Config, reason: str) -> Table:
    return Table(columns=("what", "value"), rows=[("memory", f"no estimate: {reason}")], title=_title(config))


def _workload(config: Config) -> memory.Workload:
    return workload(config, planned_slots(config, len(_gpus())))


@functools.cache
def _gpus() -> tuple[Gpu, ...]:
    """The GPUs of this machine; cached, because nvidia-smi can take a second and the form needs them at every key."""
    return this_machine().gpus


def _title(config: Config) -> str:
    method = f"LoRA of rank {config.lora_rank}" if config.use_lora else "full fine-tuning"
    model = Path(config.model_name_or_path).name if config.model_name_or_path else "a random model"
    size = config.sequence_parallel_size
    shared = f", each sequence on {size} GPUs" if size > 1 else ""
    return f"Estimated memory: {model}, {method}, {config.max_seq_length} tokens{shared}"


def _fits(needed_bytes: int, available_bytes: int) -> str:
    verdict = "fits into" if needed_bytes <= available_bytes else "more than"
    return f" ({verdict} the {size_text(available_bytes)} here)"
