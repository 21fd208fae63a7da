"""What each ZeRO preset would take for a Config, worked out from the model's config.json."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from hynb.cluster import Gpu, hostfile, this_machine
from hynb.config import Config
from hynb.errors import ConfigError, HynbError
from hynb.files import read_json
from hynb.plan import memory, zero
from hynb.runs import resume_checkpoint
from hynb.widgets.table import Table, size_text


def preset_costs(config: Config) -> Table | str:
    """One row a preset: memory of a GPU and of the host, checkpoint; or in words why it can't be told."""
    try:
        plans = memory.compare(model_config(config), _workload(config))
    except HynbError as error:
        return f"What each preset takes can't be told: {error}"
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
    """What the run takes on each GPU, by part, on the host and on the disk, beside what this machine has.

    Raises:
        ConfigError: a DeepSpeed file of one's own, whose memory is not worked out.
        ModelError: a model whose memory is not known.
    """
    if config.deepspeed not in zero.PRESETS:
        text = f"not worked out for {config.deepspeed}, which is no preset"
        return Table(columns=("what", "value"), rows=[("memory", text)], title=_title(config))
    try:
        plan = memory.estimate(model_config(config), _workload(config), preset=config.deepspeed)
    except HynbError as error:
        return Table(columns=("what", "value"), rows=[("memory", f"not known: {error}")], title=_title(config))
    machine = this_machine(config.output_dir)
    on_cpu = not machine.gpus
    rows = [(name, size_text(size_bytes)) for name, size_bytes in plan.parts.items()]
    total = f"{size_text(plan.gpu_bytes)}"
    if not on_cpu:
        total += _fits(plan.gpu_bytes, min(gpu.memory_bytes for gpu in machine.gpus))
    rows += [
        ("each GPU, together", total),
        ("host memory", size_text(plan.host_bytes) + _fits(plan.host_bytes, machine.memory_bytes)),
        ("a checkpoint on the disk", size_text(plan.disk_bytes) + _fits(plan.disk_bytes, machine.disk_free_bytes)),
    ]
    note = " (figures for GPUs; without one the same tensors lie in host memory)" if on_cpu else ""
    chosen = len(plan.parts)
    return Table(columns=("what", "bytes"), rows=rows, title=_title(config) + note, chosen=chosen)


def model_config(config: Config) -> dict[str, Any]:
    """The config.json of the run's base model, or of the random model that its sizes describe.

    Raises:
        ConfigError: there is none in the folder.
    """
    folder: Path | None = Path(config.model_name_or_path).expanduser() if config.model_name_or_path else None
    if folder is None and (checkpoint := resume_checkpoint(config)) is not None:
        adapter = read_json(checkpoint / "adapter_config.json")
        folder = Path(adapter["base_model_name_or_path"]) if adapter else checkpoint
    if folder is None:
        return _random_model(config)
    found = read_json(folder / "config.json")
    if found is None:
        raise ConfigError(f"there is no config.json in {folder}")
    return found


def _random_model(config: Config) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_experts", "moe_topk", "use_cla")
    names += ("num_key_value_heads", "cla_share_factor", "use_mixed_mlp_moe", "num_shared_expert", "use_qk_norm")
    sizes = {name: getattr(config, name) for name in (*names, "tie_word_embeddings")}
    sizes |= {"model_type": "hunyuan", "num_hidden_layers": config.num_layers}
    return sizes | {"vocab_size": config.vocab_size or _vocabulary(config)}


def _vocabulary(config: Config) -> int:
    """Tokens of the tokenizer, from its files; the tiktoken file lacks Hunyuan's 209 special ones."""
    folder = Path(config.tokenizer_name_or_path or "").expanduser()
    if (folder / "hy.tiktoken").is_file():
        with (folder / "hy.tiktoken").open("rb") as file:
            return sum(1 for _ in file) + 209
    if (folder / "tokenizer.json").is_file():
        found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return len(found["model"]["vocab"]) + len(found.get("added_tokens", []))
    raise ConfigError(f"there is no tokenizer in {folder}")


def _workload(config: Config) -> memory.Workload:
    """The parameters on which memory depends."""
    if config.hostfile is None:
        # More ranks than there are GPUs: a plan for another machine may be made on this one.
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
    """Asked once: nvidia-smi takes a second on a large machine, and the form asks at every key."""
    return this_machine().gpus


def _title(config: Config) -> str:
    method = f"LoRA of rank {config.lora_rank}" if config.use_lora else "full fine-tuning"
    model = Path(config.model_name_or_path).name if config.model_name_or_path else "a random model"
    return f"Expected memory: {model}, {method}, {config.max_seq_length} tokens"


def _fits(needed_bytes: int, there_bytes: int) -> str:
    word = "fits into" if needed_bytes <= there_bytes else "more than"
    return f" ({word} the {size_text(there_bytes)} here)"
