"""ZeRO presets (arXiv 1910.02054) as DeepSpeed configs, and a check of such configs against DeepSpeed's schema.

A DeepSpeed config may repeat values of the run, such as the precision and batch sizes. The argument `values` holds
those of the run by their path in a DeepSpeed config: {"bf16.enabled": True}.
"""

from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hynb.errors import ConfigError, nearest
from hynb.files import unique_keys

if TYPE_CHECKING:
    from pydantic import BaseModel


_GATHER_WEIGHTS = "stage3_gather_16bit_weights_on_model_save"


@dataclass(kw_only=True, frozen=True)
class Preset:
    """A way to partition a model's state over GPUs and host memory.

    Args:
        offload_optimizer: gradients and optimizer state are kept in host memory, where CPUs update the weights.
        offload_param: weights are kept in host memory.
        bucket_elements: size of all communication buffers; None: transformers derives it from the model.
        loss_scale_window: steps without overflow after which fp16's loss scale is doubled.
    """

    name: str
    stage: int
    offload_optimizer: bool = False
    offload_param: bool = False
    bucket_elements: int | None = None
    loss_scale_window: int = 1000
    title: str
    help: str


# Each needs less GPU memory than the one before, with LoRA; the README says where full fine-tuning differs.
PRESETS = {
    item.name: item
    for item in (
        Preset(
            name="ds_zero2_no_offload",
            stage=2,
            bucket_elements=100_000_000,
            loss_scale_window=100,
            title="ZeRO-2",
            help="Gradients and optimizer are partitioned over the GPUs; each holds all weights. Fastest.",
        ),
        Preset(
            name="ds_zero2_offload",
            stage=2,
            offload_optimizer=True,
            bucket_elements=500_000_000,
            title="ZeRO-2, optimizer in host memory",
            help="Each GPU holds all weights; gradients and optimizer are kept in host memory.",
        ),
        Preset(
            name="ds_zero3_no_offload",
            stage=3,
            title="ZeRO-3",
            help="Weights are partitioned too and gathered layer by layer. For models larger than one GPU.",
        ),
        Preset(
            name="ds_zero3_optimizer_offload",
            stage=3,
            offload_optimizer=True,
            title="ZeRO-3, optimizer in host memory",
            help="Weights are partitioned over the GPUs; gradients and optimizer are kept in host memory. "
            "For full fine-tuning.",
        ),
        Preset(
            name="ds_zero3_offload_no_auto",
            stage=3,
            offload_optimizer=True,
            bucket_elements=100_000_000,
            title="ZeRO-3, optimizer in host memory, small buffers",
            help="As before, with buffers of a fixed size that is small for a large model.",
        ),
        Preset(
            name="ds_zero3_param_offload",
            stage=3,
            offload_param=True,
            title="ZeRO-3, weights in host memory",
            help="Weights are kept in host memory; gradients and optimizer are partitioned over the GPUs. For LoRA.",
        ),
        Preset(
            name="ds_zero3_offload",
            stage=3,
            offload_optimizer=True,
            offload_param=True,
            title="ZeRO-3, host memory",
            help="Weights and optimizer are kept in host memory. Slower; needs much host memory. The last resort.",
        ),
    )
}


def build(name: str) -> dict[str, Any]:
    """A preset as a DeepSpeed config; transformers fills in "auto" values from the other parameters.

    Raises:
        ConfigError: an unknown preset.
    """
    if name not in PRESETS:
        near = nearest(name, PRESETS)
        raise ConfigError(f"deepspeed = {name}: is neither a preset ({', '.join(PRESETS)}) nor a file{near}")
    preset = PRESETS[name]
    ds_config: dict[str, Any] = {
        "fp16": {
            "enabled": "auto",
            "loss_scale": 0,
            "loss_scale_window": preset.loss_scale_window,
            "initial_scale_power": 16,
            "hysteresis": 2,
            # DeepSpeed accepts whole numbers only, unlike the 1e-10 of upstream's files.
            "min_loss_scale": 1,
        },
        "bf16": {"enabled": "auto"},
        "zero_optimization": _zero_section(preset),
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "steps_per_print": 1e9,
        "wall_clock_breakdown": False,
    }
    if preset.offload_optimizer:
        # In host memory DeepSpeed uses its own vectorised AdamW, several times faster than PyTorch's.
        hyperparameters = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
        ds_config["optimizer"] = {"type": "AdamW", "params": hyperparameters}
    return ds_config


def _zero_section(preset: Preset) -> dict[str, Any]:
    section: dict[str, Any] = {
        "stage": preset.stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
    }
    if preset.stage == 2:
        section |= {"allgather_partitions": True, "reduce_scatter": True}
        section |= dict.fromkeys(("allgather_bucket_size", "reduce_bucket_size"), preset.bucket_elements)
    else:
        section |= {
            "sub_group_size": 1e9,
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            # A checkpoint holds whole weights that from_pretrained reads, not one partition per rank.
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    if preset.offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if preset.offload_param:
        section["offload_param"] = {"device": "cpu", "pin_memory": True}
    if preset.stage == 3 and preset.bucket_elements is not None:
        section |= dict.fromkeys(
            (
                "reduce_bucket_size",
                "stage3_prefetch_bucket_size",
                "stage3_max_live_parameters",
                "stage3_max_reuse_distance",
            ),
            preset.bucket_elements,
        )
        section["stage3_param_persistence_threshold"] = 0
    return section


def preset_of(name_or_path: str) -> Preset | None:
    """The preset that is meant; None for a file, which wins over a preset of its name."""
    path = Path(name_or_path).expanduser()
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    # Upstream's scripts give each preset as a JSON file of the same name; hynb has them built in.
    return None if path.is_file() else PRESETS.get(path.stem)


def load(name_or_path: str) -> dict[str, Any]:
    """The DeepSpeed config of a preset, or of a JSON file.

    Raises:
        ConfigError: neither a preset nor a file, or not a JSON object, with file:line:column.
    """
    path = Path(name_or_path).expanduser()
    preset = preset_of(name_or_path)
    if preset or not path.is_file():
        return build(preset.name if preset else name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
        ds_config = json.loads(text, parse_int=_whole_number, object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: invalid UTF-8: {error}") from None
    except (OSError, RecursionError) as error:
        what = "is nested too deeply" if isinstance(error, RecursionError) else f"cannot be read: {error.strerror}"
        raise ConfigError(f"{path}: {what}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: invalid JSON: {error.msg}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(ds_config, dict):
        raise ConfigError(f"{path}:1:1: must be a JSON object of DeepSpeed settings")
    if wrong := _sections_of_wrong_type(ds_config):
        raise ConfigError([f"{path}: {name} = {json.dumps(value)[:80]}: must be an object" for name, value in wrong])
    return ds_config


def _whole_number(text: str) -> int:
    """A whole number of a DeepSpeed config, which DeepSpeed takes for a float here and there.

    Raises:
        ValueError: it is too large for that.
    """
    if len(text) > sys.float_info.max_10_exp:
        raise ValueError(f"{text[:12]}…: has {len(text):,} digits; write a smaller number")
    return int(text)


def _sections_of_wrong_type(ds_config: dict[str, Any]) -> list[tuple[str, Any]]:
    """Path and value of the sections that a run reads or changes itself, where they are none."""
    found = [
        (name, ds_config[name]) for name in ("zero_optimization", "optimizer", "fp16", "bf16") if name in ds_config
    ]
    zero = ds_config.get("zero_optimization")
    if isinstance(zero, dict):
        names = ("offload_optimizer", "offload_param", "leaf_module")
        found += [(f"zero_optimization.{name}", zero[name]) for name in names if zero.get(name) is not None]
    return [(name, value) for name, value in found if not isinstance(value, dict)]


def stage_of(ds_config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed config; 0, DeepSpeed's default, if the config has no valid one."""
    section = ds_config.get("zero_optimization")
    stage = section.get("stage", 0) if isinstance(section, dict) else 0
    return stage if isinstance(stage, int) else 0


def for_machine(ds_config: dict[str, Any], *, on_cpu: bool) -> dict[str, Any]:
    """A copy of a DeepSpeed config for this machine; on GPUs unchanged.

    Args:
        on_cpu: the machine has no GPU, so that offloading needs neither pinned memory nor a compiled optimizer.
    """
    ds_config = copy.deepcopy(ds_config)
    if on_cpu:
        # DeepSpeed compiles its CPU optimizer at first use, which takes a minute; PyTorch's runs on the same CPU.
        ds_config.setdefault("zero_force_ds_cpu_optimizer", False)
        ds_config.pop("optimizer", None)
        for name in ("offload_optimizer", "offload_param"):
            section = ds_config.get("zero_optimization", {}).get(name)
            if section:
                section["pin_memory"] = False
    return ds_config


def saving_whole_weights(ds_config: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A copy of a DeepSpeed config under which each checkpoint gets the model's weights, and a note on the change.

    Under ZeRO-3 they are gathered on rank 0 only if `stage3_gather_16bit_weights_on_model_save` is true. Upstream's
    ds_zero3_offload.json for Hy3 sets it to false, and DeepSpeed's default is false.

    Returns:
        The config, and a note for the log; the note is empty if nothing is changed.
    """
    ds_config = copy.deepcopy(ds_config)
    if stage_of(ds_config) != 3 or ds_config["zero_optimization"].get(_GATHER_WEIGHTS):
        return ds_config, ""
    ds_config["zero_optimization"][_GATHER_WEIGHTS] = True
    return ds_config, (
        f"zero_optimization.{_GATHER_WEIGHTS}: true is used; without it, checkpoints would have no file of the "
        "model's weights"
    )


def check(ds_config: dict[str, Any], values: Mapping[str, Any] | None = None, *, source: str) -> list[str]:
    """One message for each setting that DeepSpeed would refuse, or that differs from the run's own value.

    A separate process runs `problems`, because importing DeepSpeed imports torch.

    Args:
        values: the run's own values.
        source: the file that messages name.

    Raises:
        ConfigError: that process failed.
    """
    return [f"{source}: {problem}" for problem in _examined(ds_config, values or {}, source)["problems"]]


def used(name_or_path: str, values: Mapping[str, Any], *, on_cpu: bool) -> tuple[dict[str, Any], list[str]]:
    """The DeepSpeed config that a run uses, and one note for each change to its file; without torch in this process.

    Args:
        name_or_path: a preset, or a JSON file that `check` accepts.
        values: the run's own values.
        on_cpu: as `for_machine`.

    Raises:
        ConfigError: as `load` and `check`.
    """
    ds_config, notes = load(name_or_path), []
    if name_or_path not in PRESETS:
        found = _examined(ds_config, values, name_or_path)
        ds_config, notes = found["ds_config"], found["notes"]
    ds_config, note = saving_whole_weights(ds_config)
    notes = [f"deepspeed = {name_or_path}: {text}" for text in [*notes, *([note] if note else [])]]
    return for_machine(ds_config, on_cpu=on_cpu), notes


def _examined(ds_config: dict[str, Any], values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What `problems` and `correct` return, from a process of its own."""
    command = [sys.executable, "-m", "hynb.plan.zero"]
    request = json.dumps([ds_config, dict(values)])
    done = subprocess.run(command, input=request, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConfigError(f"{source}: DeepSpeed's schema could not be loaded: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def problems(ds_config: dict[str, Any], values: Mapping[str, Any] | None = None) -> list[str]:
    """As `check`, without the source; imports DeepSpeed, and torch with it."""
    values = values or {}
    ds_config, _ = correct(ds_config, values)
    return [*_schema_problems(ds_config), *_contradictions(ds_config), *_differences(ds_config, values)]


def correct(ds_config: dict[str, Any], values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A copy without invalid values in the section of a precision that is off, and one note for each of them.

    DeepSpeed would refuse them although they have no effect: upstream's files have a `min_loss_scale` of 1e-10.
    Imports DeepSpeed, and torch with it.
    """
    ds_config, notes = copy.deepcopy(ds_config), []
    for name, model in _precision_models().items():
        section = ds_config.get(name)
        # Without a value of the run, `enabled` may be anything.
        if not isinstance(section, dict) or values.get(f"{name}.enabled", True):
            continue
        if section.get("enabled", False) not in (False, "auto"):
            continue
        for key, message in _invalid_values(model, section | {"enabled": False}).items():
            value = json.dumps(section.pop(key), default=str)
            notes.append(f"{name}.{key} = {value} is left out, because {name} is off: {message}")
    return ds_config, notes


def _invalid_values(model: type[BaseModel], section: dict[str, Any]) -> dict[str, str]:
    """What a pydantic model refuses of the values of known keys, by key."""
    from pydantic import ValidationError

    try:
        model(**section)
    except ValidationError as error:
        found = [item for item in error.errors() if item["loc"] and item["type"] != "extra_forbidden"]
        return {str(item["loc"][0]): item["msg"] for item in found if item["loc"][0] in section}
    return {}


def _precision_models() -> dict[str, type[BaseModel]]:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config

    return {"fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config}


def _differences(ds_config: dict[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    """Settings that differ from the run's own; transformers would refuse them after the model is loaded."""
    for path, wanted in values.items():
        *sections, key = path.split(".")
        found: Any = ds_config
        for name in sections:
            found = found.get(name) if isinstance(found, dict) else None
        if not isinstance(found, dict) or (key not in found and key != "enabled"):
            continue
        # DeepSpeed's default of `enabled`.
        value = found.get(key, False)
        if value not in ("auto", wanted):
            text = json.dumps(value, default=str)
            yield f'{path} = {text}, but the run has {json.dumps(wanted)}: set it to "auto", or change the run'


def _contradictions(ds_config: dict[str, Any]) -> Iterator[str]:
    """Settings that are valid by themselves but not together."""

    def enabled(name: str) -> bool:
        section = ds_config.get(name)
        return isinstance(section, dict) and section.get("enabled") is True

    if enabled("fp16") and enabled("bf16"):
        yield 'fp16.enabled and bf16.enabled are both true: set one, or both to "auto"'
    zero = ds_config.get("zero_optimization")
    if isinstance(zero, dict) and zero.get("stage") != 3:
        for name in ("offload_param", "leaf_module"):
            section = zero.get(name)
            if section and not (isinstance(section, dict) and section.get("device") == "none"):
                yield f"zero_optimization.{name} needs stage 3, but stage is {zero.get('stage', 0)}"


_SECTIONS = """zero_optimization activation_checkpointing aio autotuning checkpoint comms_logger compile comet
csv_monitor data_efficiency elasticity flops_profiler hybrid_engine nebula pipeline tensor_parallel tensorboard
timers wandb weight_quantization"""


def _schema_problems(ds_config: dict[str, Any]) -> Iterator[str]:
    """What DeepSpeed's pydantic models and its own checks of batch size and clipping refuse."""
    from deepspeed.runtime import config as runtime
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = {value for name, value in vars(runtime).items() if name.isupper() and isinstance(value, str)}
    # Sections that DeepSpeed reads without a constant of their name.
    names |= set(_SECTIONS.split())
    for key in ds_config:
        if key not in names:
            yield f"unknown key {key}{nearest(key, names)}"
    for name, model in {"zero_optimization": DeepSpeedZeroConfig, **_precision_models()}.items():
        if name in ds_config:
            yield from _model_problems(name, model, ds_config[name])
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        value = ds_config.get(name, "auto")
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            yield f'{name} = {json.dumps(value)}: must be a whole number ≥ 1, or "auto"'
    value = ds_config.get("gradient_clipping", "auto")
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0):
        yield f'gradient_clipping = {json.dumps(value)}: must be a number ≥ 0, or "auto"'


def _model_problems(name: str, model: type[BaseModel], section: Any) -> Iterator[str]:
    """What a pydantic model refuses of one section, with the path of each key."""
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


def _field_names(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """Names and aliases of the fields of a pydantic model, or of one that is nested in it."""
    from pydantic import BaseModel

    for step in path:
        field = model.model_fields.get(str(step))
        candidates = (field.annotation, *typing.get_args(field.annotation)) if field else ()
        nested = [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return [name for key, field in model.model_fields.items() for name in (field.alias or key, key)]


def _main() -> None:
    """Reads a DeepSpeed config and the run's values from stdin, and prints what is found; `_examined` starts this."""
    # DeepSpeed prints to stdout when it is imported.
    with contextlib.redirect_stdout(sys.stderr):
        ds_config, values = json.load(sys.stdin)
        corrected, notes = correct(ds_config, values)
        found = {"problems": problems(ds_config, values), "ds_config": corrected, "notes": notes}
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
