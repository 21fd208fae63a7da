"""A merge with a bar that fills, and the same questions put to base, adapter and merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from IPython.display import display

from hynb.errors import ConfigError, HynbError
from hynb.widgets.merge_form import MergeChoice
from hynb.widgets.progress import ProgressBar
from hynb.widgets.table import Table, size_text
from hynb.widgets.worker import work

_SHOWN_CHARACTERS = 600


def merge(choice: MergeChoice, *, overwrite: bool = False) -> Table:
    """Merges in a process of its own, with a bar; a folder that holds this very merge is taken as it is.

    Args:
        overwrite: replace an output folder that holds something else.

    Raises:
        MergeError: what doesn't fit together, or an output folder that is there already.
        ModelError: a base folder that is incomplete.
    """
    bar = ProgressBar("merging")
    display(bar.box)
    folders = {"base_model_path": choice.base_model_path, "adapter_model_path": choice.adapter_model_path}
    arguments = folders | {"output_path": choice.output_path, "save_dtype": choice.save_dtype}
    try:
        made = work("merge", bar.report, **arguments, overwrite=overwrite)
    except HynbError:
        bar.end(False, "nothing was merged; the reason stands below")
        raise
    bar.end(True, "found: this merge was made before" if made["found"] else "merged")
    seconds = made["seconds"]
    rows = [
        ("merged model", made["output_path"]),
        ("base", choice.base_model_path),
        ("adapter", choice.adapter_model_path),
        ("tensors", f"{made['tensors_changed']} changed, {made['tensors_copied']} copied from the base"),
        ("largest change of a weight", f"{made['largest_change']:.3g} (mean {made['mean_change']:.3g})"),
        ("weights", f"{size_text(made['weight_bytes'])} in {seconds:.3g} s, save_dtype {choice.save_dtype}"),
    ]
    return Table(columns=("what", "value"), rows=rows, title="Merged")


def check(choice: MergeChoice) -> Table:
    """Reads the merged folder back and compares every tensor with what base and adapter make.

    Raises:
        MergeError: the tensors that differ, by name.
    """
    bar = ProgressBar("checking")
    display(bar.box)
    try:
        count = work("verify", bar.report, output_path=choice.output_path)
    except HynbError:
        bar.end(False, "the merged folder is not what it should be; what differs stands below")
        raise
    bar.end(True, f"{count} tensors read back, all as they should be")
    rows = [("tensors compared", str(count)), ("different", "0")]
    return Table(columns=("what", "value"), rows=rows, title="Checked")


def ask_all(choice: MergeChoice, question_file: str = "auto", *, count: int, max_new_tokens: int) -> Table:
    """Greedy answers of base, base with adapter, and merged model to the same questions.

    Args:
        question_file: JSONL of conversations; "auto" for the data that the run was trained on.
        count: questions from the file's beginning; 0 asks nothing.
        max_new_tokens: the longest answer.

    Raises:
        ConfigError: a count or length that is none, or no file to take questions from.
        DataError: a line of the file that is no conversation.
        ModelError: a folder that is no model.
    """
    numbers = {"question_count": (count, 0), "max_new_tokens": (max_new_tokens, 1)}
    problems = [
        f"{name} = {value!r}: must be a whole number, at least {least}"
        for name, (value, least) in numbers.items()
        if not isinstance(value, int) or value < least
    ]
    path = choice.train_data_file if question_file == "auto" else question_file
    if path is None or not Path(path).is_file():
        problems.append(f"question_file = {path}: there is no such file; name a JSONL of conversations")
    if problems:
        raise ConfigError(problems)
    columns = ("question", "in the data", "base", "base + adapter", "merged", "merged = adapter")
    if count == 0:
        return Table(columns=columns, rows=[], title="Nothing was asked: question_count is 0")
    folders = [choice.base_model_path, choice.adapter_model_path, choice.output_path]
    bar = ProgressBar("asking")
    display(bar.box)
    asked: list[str] = []

    def progress(report: dict[str, Any]) -> None:
        asked.append(report["folder"])
        bar.show(len(asked) - 1, len(folders), Path(report["folder"]).name)

    arguments = {"folders": folders, "questions": str(path), "count": count}
    items = work("ask", progress, **arguments, max_new_tokens=max_new_tokens)
    equal = sum(item["answers"][1] == item["answers"][2] for item in items)
    bar.end(equal == len(items), f"merged and adapter agree on {equal} of {len(items)} answers")
    rows = []
    for item in items:
        same = "yes" if item["answers"][1] == item["answers"][2] else "NO"
        texts = [_short(text) for text in (item["question"], item["expected"], *item["answers"])]
        rows.append([*texts, same])
    title = f"The same questions to all three; merged and adapter agree on {equal} of {len(items)}"
    return Table(columns=columns, rows=rows, title=title)


def _short(text: str) -> str:
    if not text:
        return "(nothing)"
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"
