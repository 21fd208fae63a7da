"""What a model folder is: family, size, precision, chat template, and how it can be trained on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hynb.cluster import this_machine
from hynb.data import ChatTemplate, Features, missing_tokenizer_files
from hynb.errors import HynbError, ModelError
from hynb.families import family_of
from hynb.files import read_json
from hynb.models.tokenizer_files import read_tokenizer_files
from hynb.models.weights import Weights, read_weights
from hynb.plan import memory
from hynb.runs import find_base

_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(kw_only=True, frozen=True)
class Fit:
    """The first preset, in the order of speed, under which a training fits this machine.

    Args:
        method: full or LoRA.
        trained: number of parameters that are trained.
        preset: None if none fits.
        gpu_bytes, host_bytes: of that preset, or of the one that needs the least GPU memory.
    """

    method: str
    trained: int
    preset: str | None
    gpu_bytes: int
    host_bytes: int


@dataclass(kw_only=True, frozen=True)
class Description:
    """What a model folder is.

    Args:
        adapter: rank and targets, if the folder is a LoRA adapter; all else is of its base.
        total, active: parameters, and those that one token passes through, embeddings included.
        mtp_layers: layers for multi-token prediction, which are not in `total` and are not trained.
        context_tokens: longest input and output together.
        tokenizer_problem: which file of the tokenizer is missing; empty if none is.
        template: None if there is no chat template, or it cannot be used.
        template_problem: why the template cannot be used; empty if it can.
        gpus, gpu_bytes, host_bytes: of this machine; gpu_bytes of its smallest GPU.
    """

    folder: str
    base: str
    adapter: dict[str, Any] | None
    family: str
    architectures: tuple[str, ...]
    total: int
    active: int
    layers: int
    experts: int
    mtp_layers: int
    weights: Weights
    context_tokens: int | None
    tokenizer_problem: str
    template: Features | None
    template_problem: str
    lora_targets: tuple[str, ...]
    fits: tuple[Fit, ...]
    gpus: int
    gpu_bytes: int
    host_bytes: int


def describe(folder: str | Path, *, max_seq_length: int = 2048, lora_rank: int = 64) -> Description:
    """Describes a model or adapter folder from its small files and the headers of the large ones, without torch.

    Args:
        max_seq_length, lora_rank: of the training whose memory is estimated; tokens.

    Raises:
        ModelError: the folder is not a model's, is broken, or is of a family that hynb does not support.
        RunError: a file is not JSON.
    """
    folder = Path(folder).expanduser().absolute()
    if not folder.is_dir():
        raise ModelError(f"{folder}: there is no such folder")
    base = find_base(folder)
    config = read_json(base / "config.json")
    assert config is not None
    family = family_of(config.get("model_type"))
    count = memory.count_parameters(config)
    tokenizer_folder = folder if (folder / "tokenizer_config.json").is_file() else base
    features, problem = _features(tokenizer_folder)
    machine = this_machine(folder)
    gpu_bytes = min((gpu.memory_bytes for gpu in machine.gpus), default=0)
    return Description(
        folder=str(folder),
        base=str(base),
        adapter=_adapter(folder) if base != folder else None,
        family=family.model_type,
        architectures=tuple(map(str, names)) if isinstance(names := config.get("architectures"), list) else (),
        total=count.total,
        active=count.active,
        layers=len(count.layers),
        experts=_largest(config.get("num_experts")) if family.moe_block else 0,
        mtp_layers=family.mtp_count(config),
        weights=read_weights(base),
        context_tokens=config.get("max_position_embeddings"),
        tokenizer_problem=missing_tokenizer_files(tokenizer_folder),
        template=features,
        template_problem=problem,
        lora_targets=tuple(
            name for name in _LORA_TARGETS if any(name in layer.projections for layer in count.layers)
        ),
        fits=_fits(config, machine.slots, gpu_bytes, machine.memory_bytes, max_seq_length, lora_rank),
        gpus=len(machine.gpus),
        gpu_bytes=gpu_bytes,
        host_bytes=machine.memory_bytes,
    )


def _largest(value: Any) -> int:
    return max((item or 0 for item in value), default=0) if isinstance(value, list) else value or 0


def _adapter(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "adapter_config.json") or {}
    targets: list[str] = []
    for given in (config.get("target_modules"), config.get("target_parameters")):
        # PEFT takes a regular expression, or "all-linear", in place of a list.
        targets += [given] if isinstance(given, str) else map(str, given) if isinstance(given, list) else []
    return {"rank": config.get("r"), "alpha": config.get("lora_alpha"), "targets": sorted(targets)}


def _features(folder: Path) -> tuple[Features | None, str]:
    """What the chat template of a folder renders, or why it renders nothing."""
    files = read_tokenizer_files(folder)
    if files is None and (folder / "chat_template.jinja").is_file():
        return None, "chat_template.jinja, which needs the special tokens in tokenizer_config.json"
    if files is None:
        return None, "none: neither a file chat_template.jinja nor a chat_template in tokenizer_config.json"
    try:
        features = ChatTemplate(files, files.template).features()
        if files.tools_template != files.template:
            other = ChatTemplate(files, files.tools_template).features()
            tools = {"tools": other.tools, "tool_calls": other.tool_calls, "tool_results": other.tool_results}
            features = replace(features, **tools)
    except HynbError as error:
        return None, str(error)
    return features, "" if features.end_tokens else "the template ends no answer, so the model would never stop"


def _fits(
    config: Mapping[str, Any], slots: int, gpu_bytes: int, host_bytes: int, max_seq_length: int, lora_rank: int
) -> tuple[Fit, ...]:
    count = memory.count_parameters(config)
    found = []
    for method, use_lora in (("full", False), ("LoRA", True)):
        workload = memory.Workload(
            world_size=slots,
            gpus_per_host=slots,
            use_lora=use_lora,
            lora_rank=lora_rank,
            max_seq_length=max_seq_length,
        )
        plans = memory.compare(config, workload)
        if gpu_bytes:
            fitting = [item for item in plans if item.gpu_bytes <= gpu_bytes and item.host_bytes <= host_bytes]
        else:
            # Without a GPU the same tensors are in host memory.
            fitting = [item for item in plans if item.gpu_bytes + item.host_bytes <= host_bytes]
        plan = fitting[0] if fitting else plans[-1]
        found.append(
            Fit(
                method=method,
                trained=count.lora(lora_rank, _LORA_TARGETS) if use_lora else count.total,
                preset=plan.preset.name if fitting else None,
                gpu_bytes=plan.gpu_bytes,
                host_bytes=plan.host_bytes,
            )
        )
    return tuple(found)
