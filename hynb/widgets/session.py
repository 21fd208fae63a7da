"""What the notebooks' cells call: parameters in, a run started or found again, its end shown."""

from __future__ import annotations

import ast
import asyncio
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hynb.config import GROUPS, Config, absolute_paths, load_yaml, parameters, read_mapping
from hynb.errors import ConfigError, RunFailedError, nearest
from hynb.launch import Run, attach, launch
from hynb.runs import RunReader, RunStatus, evaluation_line, progress_line
from hynb.widgets.panel import RunPanel
from hynb.widgets.plot import Curve, png
from hynb.widgets.table import Table, duration_text, path_text

# A notebook's own parameters cell begins with the first, the one that papermill puts in with the second.
_OWN_MARK, _INJECTED_MARK = "# Parameters:", "# Parameters"
# Plain lines of a long run: about this many, and one a minute where steps are slow.
_LINES, _LINE_SECONDS = 25, 60.0
# The width that the project's lines have, notebooks' too.
_COLUMNS = 110

# What this kernel started and shows, by run folder: a cell that runs again finds its own run.
_started: dict[Path, Config] = {}
_panels: dict[Path, RunPanel] = {}


def check_names(namespace: Mapping[str, Any], known: Iterable[str] | None = None) -> None:
    """Refuses a parameter that nobody reads; papermill only warns of a misspelt `-p`.

    Args:
        namespace: the notebook's globals(), whose `In` holds the cells that ran.
        known: every name that may be set; those in the notebook's own parameters cell where none are given.

    Raises:
        ConfigError: every unknown name, with the nearest known one.
    """
    cells = [text.lstrip() for text in namespace.get("In", [])]
    own = [index for index, text in enumerate(cells) if text.startswith(_OWN_MARK)]
    if not own:
        return
    names = _assigned(cells[own[-1]])
    known = list(names if known is None else known)
    for text in cells[own[-1] + 1 :]:
        if text.startswith(_INJECTED_MARK):
            names += _assigned(text)
    unknown = [name for name in dict.fromkeys(names) if name not in known]
    if unknown:
        raise ConfigError([f"parameters: unknown parameter {name}{nearest(name, known)}" for name in unknown])


def read_parameters(namespace: Mapping[str, Any]) -> Config:
    """The Config of a notebook's parameters cell and of what papermill put over it.

    Values that are legal by themselves but incomplete are left to the form, which shows what is missing.

    Args:
        namespace: the notebook's globals().

    Raises:
        ConfigError: unknown names and values of the wrong type, at once.
    """
    names = [item.name for item in parameters()]
    given = {name: namespace[name] for name in names if name in namespace}
    # What still stands at its default was not chosen by anybody.
    chosen = {item.name for item in parameters() if item.name in given and given[item.name] != plain(item.default)}
    reading = read_mapping({name: value for name, value in given.items() if name in chosen})
    for name, value in _further_arguments(namespace.get("training_args", "")).items():
        reading.take(name, value, "training_args")
    try:
        check_names(namespace, [*names, "training_args"])
    except ConfigError as error:
        reading.problems += error.problems
    if reading.problems:
        reading.config("parameters")
    for note in reading.notes:
        print(f"hynb: {note}")
    return Config(**reading.values, training_args=reading.training_args, given=frozenset(reading.values))


def parameters_cell() -> str:
    """The text of the parameters cell: every parameter of the schema as a plain value with its comment."""
    lines = [
        f'{_OWN_MARK} papermill sets each by `-p name value`; "auto" is chosen automatically.',
        "# Paths are relative to the folder in which the notebook runs.",
    ]
    for group, title in GROUPS.items():
        lines += ["", f"# {title}"]
        lines += [_assignment(item) for item in parameters() if item.group == group]
    lines += ["", "# Further TrainingArguments of transformers, such as: adam_beta2=0.95 eval_steps=10"]
    return "\n".join([*lines, 'training_args = ""'])


def plain(value: Any) -> Any:
    """A value in a type that papermill can inject: "auto" for None, names joined by commas for a list."""
    if value is None:
        return "auto"
    return ",".join(value) if isinstance(value, list) else value


def start_or_attach(config: Config) -> Run:
    """Starts the run of a Config, or finds it again where it was started before.

    A live run in `output_dir` is attached to; so is one that ended and was started with the same values. A
    stopped or failed one goes on if `resume_from_checkpoint` is set, and one of an earlier kernel is
    started anew if `overwrite_output_dir` is.

    Raises:
        ConfigError: what `launch` refuses, other values for a folder that holds a run among it.
    """
    config = absolute_paths(config)
    folder = Path(config.output_dir)
    status = RunReader(folder).status()
    if status.state == "absent" or not _attaches(config, status):
        run = launch(config)
        _started[folder] = config
        print(f"started in {path_text(folder)}: closing this notebook leaves it running")
        if lines := run.paste_lines():
            print(f"paste on the other hosts, of which each joins then:\n{lines}", end="")
        return run
    saved = Run(folder).dir.config
    if status.live and saved.is_file() and (different := _differences(config, load_yaml(saved))):
        print(f"a run with other values is live in {path_text(folder)} and is shown: {different}")
    else:
        print(f"found the run in {path_text(folder)}: {status}")
    return attach(folder)


def watch(run: Run) -> RunPanel:
    """A live panel on a run; the panel that this kernel showed for it before is closed."""
    if run.output_dir in _panels:
        old = _panels.pop(run.output_dir)
        old.stop_watching()
        old.close()
    panel = _panels[run.output_dir] = RunPanel(run)
    return panel


async def finished(run: Run) -> RunStatus:
    """Waits for a run's end with a plain line now and then; buttons work meanwhile.

    Interrupting the cell ends the waiting, not the run.

    Raises:
        RunFailedError: with the reason and the end of the log.
    """
    reader = RunReader(run.output_dir)
    shown_step, shown_at, state = 0, time.monotonic(), ""
    last: dict[str, Any] | None = None
    while True:
        status = reader.status()
        if status.state != state and status.live:
            print(status, flush=True)
            state = status.state
        for event in reader.new_events():
            if event["kind"] == "save":
                print(f"saved {event['path']} in {event['seconds']} s", flush=True)
            if event["kind"] == "eval":
                print(evaluation_line(event), flush=True)
            if event["kind"] != "log":
                continue
            last = event
            due = event["global_step"] - shown_step >= (status.max_steps or 0) / _LINES
            if due or time.monotonic() - shown_at > _LINE_SECONDS:
                print(progress_line(event, status.max_steps), flush=True)
                shown_step, shown_at, last = event["global_step"], time.monotonic(), None
        if not status.live:
            break
        await asyncio.sleep(0.5)
    if last is not None:
        print(progress_line(last, status.max_steps), flush=True)
    try:
        status = await asyncio.to_thread(run.wait, check=True)
    except RunFailedError:
        show_result(run)
        raise
    print(status, flush=True)
    return status


def show_result(run: Run) -> None:
    """A picture of the whole run that stays in a saved notebook, and its numbers beside."""
    from IPython.display import Image, display

    status, curve = run.status(), Curve.of(run.events())
    if curve.steps:
        picture = png(curve, status.max_steps, transparent=False)
        display(Image(picture, format="png", width=900, alt=curve.alt_text(status)))
    display(result_table(run, status, curve))


def result_table(run: Run, status: RunStatus, curve: Curve) -> Table:
    """What came of a run: state, numbers, checkpoints and where the result lies."""
    rows = [("state", str(status)), *curve.facts(status)]
    if curve.steps:
        best = min((loss, step) for loss, step in zip(curve.loss, curve.steps, strict=True) if loss == loss)
        rows.insert(2, ("lowest loss", f"{best[0]:.4f} at step {best[1]}"))
    events = run.events()
    starts = [event["time"] for event in events if event["kind"] in ("start", "resume")]
    if starts and not status.live:
        rows.append(
            ("time", duration_text(events[-1]["time"] - starts[-1]) + " from the first step to the last save")
        )
    found = run.checkpoints()
    rows.append(("checkpoints", ", ".join(path.name for path in found) or "none"))
    if found:
        is_adapter = (found[-1] / "adapter_config.json").is_file()
        rows.append(("LoRA adapter" if is_adapter else "trained model", str(found[-1])))
    return Table(columns=("what", "value"), rows=rows, title=f"Run {run.output_dir.name}")


def _attaches(config: Config, status: RunStatus) -> bool:
    """Whether the run that is in output_dir is the one that the Config means."""
    if status.live:
        return True
    run_dir = RunReader(config.output_dir).dir
    if not run_dir.config.is_file() or _differences(config, load_yaml(run_dir.config)):
        return False
    if status.state != "finished" and (config.resume_from_checkpoint or config.overwrite_output_dir):
        return False
    return not config.overwrite_output_dir or _started.get(run_dir.path) == config


def _differences(config: Config, other: Config) -> str:
    """The parameters whose values differ, in words; empty when none does."""
    ours, theirs = (item.values() | {"training_args": item.training_args} for item in (config, other))
    return ", ".join(
        f"{name} = {theirs[name]} (here {value})"
        for name, value in ours.items()
        if value != theirs[name] and name != "overwrite_output_dir"
    )


def _further_arguments(text: str | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(text, str):
        return dict(text)
    pairs = [word.partition("=") for word in text.replace(",", " ").split()]
    broken = [name for name, equals, _ in pairs if not equals]
    if broken:
        raise ConfigError(f"training_args = {text!r}: is written name=value name=value; {broken[0]} has no value")
    return {name: value for name, _, value in pairs}


def _assigned(source: str) -> list[str]:
    """The names that a cell gives values to."""
    names = []
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


def _assignment(item: Any) -> str:
    """One line of the parameters cell; the comment is as much of the help's first sentence as fits."""
    value = plain(item.default)
    quoted = f'"{value}"' if isinstance(value, str) else repr(value)
    bounds = " ".join(part for part in (item.range, item.unit) if part)
    end = f" ({bounds})" if bounds else ""
    start = f"{item.name} = {quoted}  # "
    comment = item.help.split(". ")[0].rstrip(".")
    while len(start + comment + end) > _COLUMNS:
        comment = comment[: max(comment.rfind(mark) for mark in (": ", ", ", "; ", " or "))]
    return start + comment + end
