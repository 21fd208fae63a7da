"""Reads a Config from flags, YAML or a notebook's parameters, all mistakes at once, and writes it as YAML."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hynb.config.rules import check_config
from hynb.config.schema import Config, parameter, parameters
from hynb.errors import ConfigError, nearest

# TrainingArguments that transformers 5 dropped, as older scripts still pass them: new name, and what to say.
RENAMED = {
    "evaluation_strategy": ("eval_strategy", "is called eval_strategy now"),
    "per_gpu_train_batch_size": ("per_device_train_batch_size", "is called per_device_train_batch_size now"),
    "no_cuda": ("use_cpu", "is called use_cpu now"),
    "use_mps_device": (None, "is gone: the device is found by itself"),
    "logging_dir": (None, "is not used: TensorBoard events go to output_dir/tensorboard"),
    "half_precision_backend": (None, "is gone: bf16 and fp16 use PyTorch's own"),
    "fp16_opt_level": (None, "is gone: it belonged to apex"),
    "fp16_backend": (None, "is gone: bf16 and fp16 use PyTorch's own"),
    "overwrite_cache": (None, "is not needed: no cache of an earlier run is taken for another's"),
    "dispatch_batches": (None, "is gone from transformers 5"),
    "split_batches": (None, "is gone from transformers 5"),
    "ddp_backend": (None, "is not used: DeepSpeed takes nccl on GPUs and gloo on CPUs"),
    "tpu_num_cores": (None, "is not used: hynb trains on GPUs and CPUs"),
}
# Set by hynb itself for every run; a value from outside would contradict the run folder or DeepSpeed.
_OWNED = {
    "report_to": "TensorBoard events and events.jsonl are always written under output_dir",
    "remove_unused_columns": "the data set holds no unused columns",
    "fsdp": "hynb trains with DeepSpeed",
    "fsdp_config": "hynb trains with DeepSpeed",
    "auto_find_batch_size": "under DeepSpeed a changed batch size would change the run in silence",
    "push_to_hub": "hynb uploads nothing",
}


@dataclass
class Reading:
    """A Config in the making, with what was wrong and what the user should hear of."""

    values: dict[str, Any] = field(default_factory=dict)
    training_args: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, name: str, value: Any, where: str) -> None:
        """Files one value under its parameter or TrainingArguments name, or a problem on it."""
        known = {item.name for item in parameters()}
        if name in RENAMED:
            new_name, saying = RENAMED[name]
            self.notes.append(f"{name} {saying}")
            if new_name is None:
                return
            name = new_name
        try:
            if name in known:
                self.values[name] = parameter(name).parse(value)
            elif name in _OWNED:
                self.notes.append(f"{name} is not used: {_OWNED[name]}")
            elif name in training_argument_types():
                self.training_args[name] = _parse_training_argument(training_argument_types()[name], value)
            else:
                near = nearest(name, known | training_argument_types().keys())
                self.problems.append(f"{where}: unknown parameter {name}{near}")
        except ValueError as error:
            self.problems.append(f"{where}: {name} {error}")

    def config(self, source: str) -> Config:
        """The finished Config.

        Raises:
            ConfigError: with every problem found, those of reading and those of the values.
        """
        config = Config(**self.values, training_args=self.training_args, given=frozenset(self.values))
        problems = self.problems + [f"{source}: {problem}" for problem in check_config(config)]
        if problems:
            raise ConfigError(problems)
        return config


def read_flags(argv: Sequence[str]) -> Reading:
    """Values from `--name value`, `--name=value` and bare `--switch` flags.

    Args:
        argv: the command line without the program's name; `--local_rank` of the launcher is passed over.
    """
    reading = Reading()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            reading.problems.append(f"command line: {word!r} is no flag; flags are written --name value")
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            following = []
            while rest and not rest[0].startswith("--"):
                following.append(rest.pop(0))
            value = ",".join(following) if following else None
        if name == "local_rank":
            continue
        if value is None and not _is_switch(name):
            known = {item.name for item in parameters()} | training_argument_types().keys() | RENAMED.keys()
            if name in known:
                reading.problems.append(f"command line: --{name} is given without a value")
            else:
                near = nearest(name, known)
                reading.problems.append(f"command line: unknown parameter {name}{near}")
            continue
        reading.take(name, True if value is None else value, "command line")
    return reading


def read_yaml(path: str | Path) -> Reading:
    """Values from a flat YAML mapping; problems carry file:line.

    Raises:
        ConfigError: when the file is absent or no YAML mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; write one with: hynb parameters --yaml > {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}{line}: no valid YAML: {what}") from None
    reading = Reading()
    if root is None:
        return reading
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}:1: must be a mapping of parameters, such as `max_steps: 100`")
    seen: dict[str, int] = {}
    for key, node in root.value:
        line = key.start_mark.line + 1
        where = f"{path}:{line}"
        if key.value in seen:
            reading.problems.append(f"{where}: {key.value} is given twice, first in line {seen[key.value]}")
            continue
        seen[key.value] = line
        reading.take(str(key.value), yaml.safe_load(yaml.serialize(node)), where)
    return reading


def read_mapping(values: Mapping[str, Any], where: str = "parameters") -> Reading:
    """Values from plain Python ones, as a notebook's parameters cell holds them."""
    reading = Reading()
    for name, value in values.items():
        reading.take(name, value, where)
    return reading


def read_settings(reading: Reading, settings: Iterable[str]) -> Reading:
    """`key=value` words of `--set` on top of an earlier reading."""
    for word in settings:
        name, equals, value = word.partition("=")
        if not equals:
            reading.problems.append(f"--set {word}: is written key=value")
            continue
        reading.take(name.strip(), value.strip(), f"--set {word}")
    return reading


def load_yaml(path: str | Path) -> Config:
    """The Config in a YAML file.

    Raises:
        ConfigError: all mistakes at once, with file:line where a line is at fault.
    """
    return read_yaml(path).config(str(path))


def to_yaml(config: Config, *, explain: bool = False) -> str:
    """A Config as YAML that `load_yaml` reads back to an equal one.

    Args:
        explain: write each parameter's help as a comment beside it.
    """
    lines = []
    for item in parameters():
        value = getattr(config, item.name)
        entry = yaml.safe_dump({item.name: value}, allow_unicode=True, width=1000)
        if explain:
            bounds = f" ({item.range})" if item.range else ""
            lines.append(f"# {item.help}{bounds}\n")
        lines.append(entry)
    if config.training_args:
        lines.append(yaml.safe_dump(config.training_args, allow_unicode=True))
    return "".join(lines)


@functools.cache
def training_argument_types() -> dict[str, str]:
    """Names of transformers' TrainingArguments with their annotations, read from its source.

    Its import takes seconds and brings torch, which a notebook's kernel does without.
    """
    package = importlib.util.find_spec("transformers")
    source = Path(package.origin).with_name("training_args.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
            return {
                item.target.id: ast.unparse(item.annotation) for item in node.body if isinstance(item, ast.AnnAssign)
            }
    raise RuntimeError("this release of transformers has no TrainingArguments class in training_args.py")


def _is_switch(name: str) -> bool:
    if name in RENAMED:
        return RENAMED[name][0] is None or _is_switch(RENAMED[name][0])
    for item in parameters():
        if item.name == name:
            return item.type is bool
    return training_argument_types().get(name, "").startswith("bool")


def _parse_training_argument(annotation: str, value: Any) -> Any:
    """A TrainingArguments value in the type of its annotation; the class itself checks its range."""
    if not isinstance(value, str):
        return float(value) if annotation.startswith("float") and isinstance(value, int) else value
    kinds = [part.strip() for part in annotation.split("|")]
    if "None" in kinds and value.lower() in ("none", ""):
        return None
    if "str" in kinds and not {"bool", "dict"} & set(kinds):
        return value
    parsed = yaml.safe_load(value)
    if "float" in kinds and not isinstance(parsed, bool):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"is {value!r}; it takes a number") from None
    for kind, wanted, words in (
        ("bool", bool, "true or false"),
        ("int", int, "a whole number"),
    ):
        if kind in kinds and "str" not in kinds and not isinstance(parsed, wanted):
            raise ValueError(f"is {value!r}; it takes {words}")
    if any(kind.startswith("list") for kind in kinds) and isinstance(parsed, str):
        return parsed.replace(",", " ").split()
    return parsed
