"""The parameters of a notebook: its own cell, what papermill injected, and the text of the cell from the schema."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from typing import Any

from hynb.config import GROUPS, Config, Parameter, parameters, read_mapping
from hynb.errors import ConfigError, nearest

# The first line of a notebook's own parameters cell, and of the one that papermill injects.
_OWN_MARK, _INJECTED_MARK = "# Parameters:", "# Parameters"
# Shorter than the project's lines, because JupyterLab wraps longer ones on a laptop's screen.
_COLUMNS = 110


def check_names(namespace: Mapping[str, Any], known: Iterable[str] | None = None) -> None:
    """Refuses unknown parameters; papermill only warns of a misspelt `-p`.

    Args:
        namespace: the notebook's globals(), whose `In` contains the source of the cells that ran.
        known: every name that may be set; by default the names in the notebook's own parameters cell.

    Raises:
        ConfigError: every unknown name, with the nearest known one.
    """
    cells = [text.lstrip() for text in namespace.get("In", [])]
    own = [index for index, text in enumerate(cells) if text.startswith(_OWN_MARK)]
    if not own:
        return
    names = _assigned_names(cells[own[-1]])
    known = list(names if known is None else known)
    for text in cells[own[-1] + 1 :]:
        if text.startswith(_INJECTED_MARK):
            names += _assigned_names(text)
    unknown = [name for name in dict.fromkeys(names) if name not in known]
    if unknown:
        raise ConfigError([f"parameters: unknown parameter {name}{nearest(name, known)}" for name in unknown])


def read_parameters(namespace: Mapping[str, Any]) -> Config:
    """The Config of a notebook's parameters cell and of the values that papermill injected.

    Values that are valid by themselves but incomplete are accepted: the form shows what is missing.

    Args:
        namespace: the notebook's globals().

    Raises:
        ConfigError: unknown names and values of the wrong type, at once.
    """
    names = [item.name for item in parameters()]
    changed = {
        item.name: namespace[item.name]
        for item in parameters()
        if item.name in namespace and namespace[item.name] != plain_value(item.default)
    }
    reading = read_mapping(changed)
    for name, value in _training_arguments(namespace.get("training_args", "")).items():
        reading.take(name, value, "training_args")
    try:
        check_names(namespace, [*names, "training_args"])
    except ConfigError as error:
        reading.problems += error.problems
    if reading.problems:
        reading.config("parameters")
    for note in reading.notes:
        print(f"hynb: {note}")
    return Config(**reading.values, training_args=reading.training_args, given=reading.given)


def parameters_cell() -> str:
    """The source of the parameters cell: every parameter of the schema as a plain value with a comment."""
    lines = [
        f'{_OWN_MARK} papermill sets each with `-p name value`; "auto" means chosen automatically.',
        "# Paths are relative to the folder in which the notebook runs.",
    ]
    for group, title in GROUPS.items():
        lines += ["", f"# {title}"]
        lines += [_assignment(item) for item in parameters() if item.group == group]
    lines += ["", "# Further TrainingArguments of transformers, such as: adam_beta2=0.95 eval_steps=10"]
    return "\n".join([*lines, 'training_args = ""'])


def plain_value(value: Any) -> Any:
    """A value in a type that papermill can inject: "auto" for None, names separated by commas for a list."""
    if value is None:
        return "auto"
    return ",".join(value) if isinstance(value, list) else value


def _training_arguments(value: str | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(value, str):
        return dict(value)
    pairs = [word.partition("=") for word in value.replace(",", " ").split()]
    incomplete = [name for name, equals, _ in pairs if not equals]
    if incomplete:
        raise ConfigError(
            f"training_args = {value!r}: must be written as name=value name=value; {incomplete[0]} has no value"
        )
    return {name: item for name, _, item in pairs}


def _assigned_names(source: str) -> list[str]:
    """The names that a cell assigns values to."""
    names = []
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


def _assignment(item: Parameter) -> str:
    """One line of the parameters cell; the comment is as much of the help's first sentence as fits."""
    value = plain_value(item.default)
    literal = f'"{value}"' if isinstance(value, str) else repr(value)
    bounds = " ".join(part for part in (item.range, item.unit) if part)
    end = f" ({bounds})" if bounds else ""
    start = f"{item.name} = {literal}  # "
    first_sentence = item.help.split(". ")[0].rstrip(".")
    return start + _shortened(first_sentence, _COLUMNS - len(start + end)) + end


def _shortened(text: str, width: int) -> str:
    """As many clauses of a sentence as fit, or as many words if none does."""
    while len(text) > width:
        end = max(text.rfind(mark) for mark in (": ", ", ", "; ", " or "))
        if end < 0:
            return text[: width - 1].rsplit(" ", 1)[0] + "…"
        text = text[:end].rstrip(" ,;:")
    return text
