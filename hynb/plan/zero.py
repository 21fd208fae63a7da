"""ZeRO presets (arXiv 1910.02054) as DeepSpeed configs, and a check: `python -m hynb.plan.zero FILE`."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hynb.errors import ConfigError, nearest


@dataclass(kw_only=True, frozen=True)
class Preset:
    """A way to spread a model's state over GPUs and host memory."""

    name: str
    stage: int
    offload: bool
    title: str
    help: str


# In this order each needs less GPU memory than the one before.
PRESETS = {
    item.name: item
    for item in (
        Preset(
            name="ds_zero2_no_offload",
            stage=2,
            offload=False,
            title="ZeRO-2",
            help="Gradients and optimizer are spread over the GPUs; each holds all weights. Fastest.",
        ),
        Preset(
            name="ds_zero3_no_offload",
            stage=3,
            offload=False,
            title="ZeRO-3",
            help="Weights are spread too and gathered layer by layer. For models larger than one GPU.",
        ),
        Preset(
            name="ds_zero3_offload",
            stage=3,
            offload=True,
            title="ZeRO-3, host memory",
            help="Weights and optimizer wait in host memory. Slower; needs much of it.",
        ),
        Preset(
            name="ds_zero3_offload_no_auto",
            stage=3,
            offload=True,
            title="ZeRO-3, host memory, small buffers",
            help="As before, with the buffers on the GPU at their smallest. The last resort.",
        ),
    )
}


def build(name: str) -> dict[str, Any]:
    """A preset as a DeepSpeed config; "auto" values are filled in by transformers from the other parameters.

    Raises:
        ConfigError: for a name that is no preset.
    """
    if name not in PRESETS:
        near = nearest(name, PRESETS)
        raise ConfigError(f"deepspeed = {name}: is neither a preset ({', '.join(PRESETS)}) nor a file{near}")
    preset = PRESETS[name]
    zero: dict[str, Any] = {
        "stage": preset.stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
    }
    if preset.stage == 2:
        zero |= {"allgather_partitions": True, "allgather_bucket_size": 5e8, "reduce_scatter": True}
        zero["reduce_bucket_size"] = 5e8
    else:
        zero |= {
            "sub_group_size": 1e9,
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            # A checkpoint is whole weights that from_pretrained reads, not one part for each rank.
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    if preset.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    if name == "ds_zero3_offload_no_auto":
        zero |= {
            "reduce_bucket_size": 1e6,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 1e4,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        }
    ds_config = {
        "fp16": {
            "enabled": "auto",
            "loss_scale": 0,
            "loss_scale_window": 1000,
            "initial_scale_power": 16,
            "hysteresis": 2,
            # DeepSpeed takes whole numbers only; the fraction in older files is refused.
            "min_loss_scale": 1,
        },
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "steps_per_print": 1e9,
        "wall_clock_breakdown": False,
    }
    if preset.offload:
        # In host memory DeepSpeed steps with its own vectorised AdamW, several times faster than PyTorch's.
        hyperparameters = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
        ds_config["optimizer"] = {"type": "AdamW", "params": hyperparameters}
    return ds_config


def load(name_or_path: str) -> dict[str, Any]:
    """A preset by its name, or a DeepSpeed JSON file.

    Raises:
        ConfigError: neither, or a file that is no JSON object, with file:line:column.
    """
    path = Path(name_or_path).expanduser()
    if name_or_path in PRESETS or not path.is_file():
        # The guide names its presets by file; without the file the name still says which is meant.
        return build(path.stem if path.stem in PRESETS else name_or_path)
    try:
        ds_config = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: no UTF-8 text: {error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: no valid JSON: {error.msg}") from None
    if not isinstance(ds_config, dict):
        raise ConfigError(f"{path}:1:1: must be a JSON object of DeepSpeed settings")
    return ds_config


def for_machine(ds_config: dict[str, Any], *, on_cpu: bool) -> dict[str, Any]:
    """The same config with what a CPU needs; on GPUs unchanged.

    Args:
        on_cpu: no GPU is here, so that "offloading" needs neither pinned memory nor a compiled optimizer.
    """
    ds_config = copy.deepcopy(ds_config)
    if on_cpu:
        # DeepSpeed's own CPU optimizer is compiled at first use, a minute that a machine without GPU gains
        # nothing from: there the usual optimizer runs on the same processor.
        ds_config.setdefault("zero_force_ds_cpu_optimizer", False)
        ds_config.pop("optimizer", None)
        for name in ("offload_optimizer", "offload_param"):
            section = ds_config.get("zero_optimization", {}).get(name)
            if section:
                section["pin_memory"] = False
    return ds_config


def check(ds_config: dict[str, Any], *, source: str) -> list[str]:
    """What DeepSpeed's own schema refuses, one message a key; empty when nothing is.

    DeepSpeed is asked in a process of its own, because its import brings torch.

    Args:
        source: the file that is named in messages.
    """
    command = [sys.executable, "-m", "hynb.plan.zero"]
    asked = subprocess.run(command, input=json.dumps(ds_config), capture_output=True, text=True, check=False)
    if asked.returncode:
        raise ConfigError(f"{source}: DeepSpeed could not be asked: {asked.stderr.strip().splitlines()[-1:]}")
    found = json.loads(asked.stdout.splitlines()[-1])
    return [f"{source}: {problem}" for problem in found + _contradictions(ds_config)]


def _contradictions(ds_config: dict[str, Any]) -> list[str]:
    def enabled(name: str) -> bool:
        section = ds_config.get(name)
        return isinstance(section, dict) and section.get("enabled") is True

    problems = []
    if enabled("fp16") and enabled("bf16"):
        problems.append('fp16.enabled and bf16.enabled are both true: set one, or both to "auto"')
    zero = ds_config.get("zero_optimization")
    if isinstance(zero, dict) and zero.get("stage") != 3:
        problems += [
            f"zero_optimization.{name} needs stage 3, and stage is {zero.get('stage', 0)}"
            for name in ("offload_param", "leaf_module")
            if zero.get(name)
        ]
    return problems


_SECTIONS = """zero_optimization activation_checkpointing aio autotuning checkpoint comms_logger compile comet
csv_monitor data_efficiency elasticity flops_profiler hybrid_engine nebula pipeline tensor_parallel tensorboard
timers wandb weight_quantization"""


def _schema_problems(ds_config: dict[str, Any]) -> Iterator[str]:
    """Asks DeepSpeed's pydantic models; runs in the process that `check` starts."""
    from deepspeed.runtime import config as runtime
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = {value for name, value in vars(runtime).items() if name.isupper() and isinstance(value, str)}
    # Sections that DeepSpeed reads without naming them among these constants.
    names |= set(_SECTIONS.split())
    for key in ds_config:
        if key not in names:
            yield f"unknown key {key}{nearest(key, names)}"
    sections = {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
    }
    for name, model in sections.items():
        if name in ds_config:
            yield from _model_problems(name, model, ds_config[name])
    numbers = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    for name in numbers:
        value = ds_config.get(name, "auto")
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            yield f'{name} = {json.dumps(value)}: must be a whole number from 1 on, or "auto"'
    value = ds_config.get("gradient_clipping", "auto")
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0):
        yield f'gradient_clipping = {json.dumps(value)}: must be a number from 0 on, or "auto"'


def _model_problems(name: str, model: type, section: Any) -> Iterator[str]:
    from pydantic import ValidationError

    if not isinstance(section, dict):
        yield f"{name} = {json.dumps(section)}: must be an object"
        return
    try:
        model(**section)
    except ValidationError as error:
        for item in error.errors():
            path = ".".join(map(str, (name, *item["loc"])))
            if item["type"] == "extra_forbidden":
                *parents, key = item["loc"]
                yield f"unknown key {path}{nearest(str(key), _field_names(model, parents))}"
            else:
                yield f"{path} = {json.dumps(item['input'], default=str)}: {item['msg']}"
    except (AssertionError, ValueError, TypeError) as error:
        yield f"{name}: {error}"


def _field_names(model: type, path: list[Any]) -> list[str]:
    """Names and aliases of a pydantic model's fields, or of one nested in it."""
    import typing

    for step in path:
        field = model.model_fields.get(step)
        candidates = (field.annotation, *typing.get_args(field.annotation)) if field else ()
        nested = [item for item in candidates if hasattr(item, "model_fields")]
        if not nested:
            return []
        model = nested[0]
    return [name for key, field in model.model_fields.items() for name in (field.alias or key, key)]


if __name__ == "__main__":
    import contextlib

    text = Path(sys.argv[1]).read_text() if len(sys.argv) > 1 else sys.stdin.read()
    with contextlib.redirect_stdout(sys.stderr):
        problems = list(_schema_problems(json.loads(text)))
    print(json.dumps(problems))
