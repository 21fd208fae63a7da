"""Reads a Config from flags, YAML or a notebook's parameters, reporting all mistakes at once; writes it as YAML."""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hynb.config.parameter import PARSERS
from hynb.config.rules import check_config
from hynb.config.schema import Config, parameter, parameters
from hynb.errors import ConfigError, nearest

# TrainingArguments that transformers 5 renamed.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "no_cuda": "use_cpu",
}
# TrainingArguments, of transformers 5 and of earlier releases, that are accepted without effect.
IGNORED = {
    "use_mps_device": "the device is chosen automatically",
    "logging_dir": "TensorBoard events are written to output_dir/tensorboard",
    "half_precision_backend": "bf16 and fp16 use PyTorch's own mixed precision",
    "fp16_opt_level": "it belongs to apex, which hynb does not use",
    "fp16_backend": "bf16 and fp16 use PyTorch's own mixed precision",
    "overwrite_cache": "cached results are kept by the content of the data files",
    "dispatch_batches": "transformers 5 has no such option",
    "split_batches": "transformers 5 has no such option",
    "ddp_backend": "DeepSpeed uses nccl on GPUs and gloo on CPUs",
    "tpu_num_cores": "hynb trains on GPUs and CPUs",
    "report_to": "TensorBoard events and events.jsonl are always written to output_dir",
    "remove_unused_columns": "the data set has no unused columns",
    "fsdp": "hynb trains with DeepSpeed",
    "fsdp_config": "hynb trains with DeepSpeed",
    "auto_find_batch_size": "a batch size that changes by itself would silently change the run",
    "push_to_hub": "hynb uploads nothing",
}
# Flags of upstream's scripts that are accepted without effect.
IGNORED |= {
    "model_size": "the tokenizer's own chat template decides the dialect that upstream chooses by it",
    "cache_dir": "models and tokenizers are local folders",
    "max_position_embeddings": "a given model decides it, a random one has max_seq_length (2048 at least)",
    "layer_norm_eps": "a given model decides it; upstream's script does not use it for a random one either",
    "type_vocab_size": "Hunyuan models have no token types; upstream's script does not use it either",
    "complex_data": "upstream's script does not use it either",
}

# Of a file of parameters: `hynb parameters --yaml` writes 20,000 characters.
_LARGEST_FILE, _DEEPEST = 1_000_000, 20


@dataclass
class Reading:
    """Values that were read for a Config, the mistakes among them, and notes for the user.

    Attributes:
        defaults: values of parameters that were not given, where they differ from the schema's.
    """

    values: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    training_args: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, name: str, value: Any, where: str) -> None:
        """Adds the value of a parameter or of another TrainingArguments field, or a problem.

        Args:
            where: the source of the value, which the problem's message begins with.
        """
        if name in RENAMED:
            self.notes.append(f"{name} is now called {RENAMED[name]}")
            name = RENAMED[name]
        known = {item.name for item in parameters()}
        try:
            if name in known:
                self.values[name] = parameter(name).parse(value)
            elif name in IGNORED:
                self.notes.append(f"{name} is ignored: {IGNORED[name]}")
            elif name in training_argument_types():
                self.training_args[name] = _parse_training_argument(training_argument_types()[name], value)
            else:
                near = nearest(name, known | training_argument_types().keys())
                self.problems.append(f"{where}: unknown parameter {name}{near}")
        except ValueError as error:
            self.problems.append(f"{where}: {name} {error}")

    @property
    def given(self) -> frozenset[str]:
        """Names of the parameters that the user set; the file of a run names all, whose defaults nobody set."""
        names_all = len(self.values) == len(parameters())
        return frozenset(
            name for name, value in self.values.items() if not names_all or value != parameter(name).default
        )

    def config(self, source: str) -> Config:
        """The Config of all values.

        Raises:
            ConfigError: every mistake, those of reading and those of the values.
        """
        values = self.defaults | self.values
        config = Config(**values, training_args=self.training_args, given=self.given)
        problems = self.problems + [f"{source}: {problem}" for problem in check_config(config)]
        if problems:
            raise ConfigError(problems)
        return config


def read_flags(argv: Sequence[str]) -> Reading:
    """Values from `--name value`, `--name=value` and bare `--switch` flags.

    Args:
        argv: the command line without the program's name; the launcher's `--local_rank` is skipped.
    """
    reading = Reading()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            reading.problems.append(f"command line: {word!r} is not a flag; write flags as --name value")
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if name == "local_rank":
            continue
        if values:
            reading.take(name, ",".join(values), "command line")
        elif _is_switch(name):
            reading.take(name, True, "command line")
        else:
            reading.problems.append(f"command line: {_missing_value(name)}")
    return reading


def read_yaml(path: str | Path) -> Reading:
    """Values from a flat YAML mapping; problems have file:line.

    Raises:
        ConfigError: the file does not exist or is not a YAML mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; write one with: hynb parameters --yaml > {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        _refuse_features(text, path)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}{line}: invalid YAML: {what}") from None
    reading = Reading()
    if root is None:
        return reading
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}:1: must be a mapping of parameters, such as `max_steps: 100`")
    seen: dict[str, int] = {}
    for key, node in root.value:
        line = key.start_mark.line + 1
        _take_yaml(reading, key, node, f"{path}:{line}", seen)
    return reading


def _refuse_features(text: str, path: Path) -> None:
    """Refuses what a file of parameters has no use for, before anything is built of it.

    A few lines with aliases stand for gigabytes.

    Raises:
        ConfigError: with file:line.
        yaml.YAMLError: the text is not YAML.
    """
    if len(text) > _LARGEST_FILE:
        raise ConfigError(f"{path}: has {len(text):,} characters, a file of parameters {_LARGEST_FILE:,} at most")
    if problem := _feature(text):
        raise ConfigError(f"{path}:{problem[0]}: has {problem[1]}")


def _feature(text: str) -> tuple[int, str] | None:
    """The first line of a YAML text, and what is in it, that no parameter takes; None if there is nothing.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        found = ""
        if isinstance(event, yaml.AliasEvent):
            found = f"an alias (*{event.anchor}): write the value out"
        elif getattr(event, "anchor", None):
            found = f"an anchor (&{event.anchor}): write the value without it"
        elif depth > _DEEPEST:
            found = f"values nested in more than {_DEEPEST} levels: no parameter takes them"
        if found:
            return event.start_mark.line + 1, found
    return None


def _take_yaml(reading: Reading, key: yaml.Node, node: yaml.Node, where: str, seen: dict[str, int]) -> None:
    """Adds one entry of a YAML mapping; `seen` has the line of each earlier key."""
    if not isinstance(key, yaml.ScalarNode):
        reading.problems.append(f"{where}: a key must be the name of a parameter")
        return
    if key.value in seen:
        reading.problems.append(f"{where}: {key.value} is given twice, first in line {seen[key.value]}")
        return
    seen[key.value] = key.start_mark.line + 1
    try:
        value = yaml.safe_load(yaml.serialize(node))
    except (yaml.YAMLError, ValueError) as error:
        what = getattr(error, "problem", None) or error
        reading.problems.append(f"{where}: {key.value} has an invalid YAML value: {what}")
        return
    reading.take(key.value, value, where)


def read_mapping(values: Mapping[str, Any], where: str = "parameters") -> Reading:
    """Values from plain Python ones, as in a notebook's parameters cell."""
    reading = Reading()
    for name, value in values.items():
        reading.take(name, value, where)
    return reading


def read_settings(reading: Reading, settings: Iterable[str]) -> Reading:
    """Adds `key=value` words of `--set` to a reading and returns it."""
    for word in settings:
        name, equals, value = word.partition("=")
        if not equals:
            reading.problems.append(f"--set {word}: must be key=value")
            continue
        reading.take(name.strip(), value.strip(), f"--set {word}")
    return reading


def load_yaml(path: str | Path) -> Config:
    """The Config in a YAML file.

    Raises:
        ConfigError: all mistakes at once, with file:line where a line has one.
    """
    return read_yaml(path).config(str(path))


def to_yaml(config: Config, *, explain: bool = False) -> str:
    """A Config as YAML; `load_yaml` reads it back to an equal one.

    Args:
        explain: write each parameter's help as a comment above it.
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
    """The annotation of each field of transformers' TrainingArguments, read from its source.

    Importing the class takes seconds and imports torch, which a notebook's kernel does without.
    """
    package = importlib.util.find_spec("transformers")
    assert package is not None and package.origin is not None
    source = Path(package.origin).with_name("training_args.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
            return {
                item.target.id: ast.unparse(item.annotation)
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
    raise RuntimeError("this release of transformers has no class TrainingArguments in training_args.py")


def _is_switch(name: str) -> bool:
    """Whether a flag may be given without a value."""
    if name in IGNORED:
        return True
    name = RENAMED.get(name, name)
    for item in parameters():
        if item.name == name:
            return item.type is bool
    return training_argument_types().get(name, "").startswith("bool")


def _missing_value(name: str) -> str:
    known = {item.name for item in parameters()} | training_argument_types().keys() | RENAMED.keys()
    if name in known:
        return f"--{name} is given without a value"
    return f"unknown parameter {name}{nearest(name, known)}"


def _parse_training_argument(annotation: str, value: Any) -> Any:
    """A value in the type of its annotation; TrainingArguments itself checks its range.

    Args:
        annotation: as in the class, such as `int | None`.

    Raises:
        ValueError: what is wrong with the value.
    """
    kinds = [part.strip() for part in annotation.split("|")]
    if "None" in kinds and (value is None or (isinstance(value, str) and value.lower() in ("none", ""))):
        return None
    if "str" not in kinds:
        for kind, parse in PARSERS.items():
            if kind.__name__ in kinds:
                parsed = parse(value)
                if isinstance(parsed, float) and not math.isfinite(parsed):
                    raise ValueError(f"is {value!r}; it takes a finite number")
                return parsed
    if not isinstance(value, str) or ("str" in kinds and not {"bool", "dict"} & set(kinds)):
        return value
    try:
        if problem := _feature(value):
            raise ValueError(f"has {problem[1]}")
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"is {value[:200]!r}, which is invalid YAML") from None
    if isinstance(parsed, str) and any(kind.startswith("list") for kind in kinds):
        return parsed.replace(",", " ").split()
    return parsed
