"""A merge with its progress bar, its check, and the same questions to base, adapter and merged model."""

from __future__ import annotations

from pathlib import Path

from IPython.display import display

from hynb.errors import ConfigError, HynbError
from hynb.files import size_text
from hynb.widgets.answer_view import AnswerView
from hynb.widgets.merge_form import MergeChoice
from hynb.widgets.progress import ProgressBar
from hynb.widgets.table import Table
from hynb.widgets.tasks import AskedQuestion, MergedModel
from hynb.widgets.worker import work

_SHOWN_CHARACTERS = 600
_MODELS = ("base", "base + adapter", "merged")


def merge(choice: MergeChoice, *, overwrite: bool = False) -> Table:
    """Merges in another process, with a bar; an output folder that already has this merge is left as it is.

    Args:
        overwrite: replace an output folder with other content.

    Raises:
        MergeError: base and adapter do not fit together, or the output folder exists already.
        ModelError: the base folder is incomplete.
    """
    bar = ProgressBar("merging")
    display(bar.box)
    try:
        made = MergedModel(
            **work(
                "merge",
                bar.show,
                base_model_path=choice.base_model_path,
                adapter_model_path=choice.adapter_model_path,
                output_path=choice.output_path,
                save_dtype=choice.save_dtype,
                overwrite=overwrite,
            )
        )
    except HynbError:
        bar.end(False, "Nothing was merged; the reason is shown below.")
        raise
    bar.end(True, "This merge exists already." if made.found else "Merged.")
    rows = [
        ("merged model", made.output_path),
        ("base", choice.base_model_path),
        ("adapter", choice.adapter_model_path),
        ("tensors", f"{made.tensors_changed} changed, {made.tensors_copied} copied from the base"),
        ("largest change of a weight", f"{made.largest_change:.3g} (mean {made.mean_change:.3g})"),
        ("weights", f"{size_text(made.weight_bytes)} in {made.seconds:.3g} s, save_dtype {choice.save_dtype}"),
    ]
    return Table(columns=("what", "value"), rows=rows, title="Merged")


def check(choice: MergeChoice) -> Table:
    """Reads the merged folder back and compares every tensor with what base and adapter give.

    Raises:
        MergeError: the tensors that differ, by name.
    """
    bar = ProgressBar("checking")
    display(bar.box)
    try:
        count = work("verify", bar.show, output_path=choice.output_path)
    except HynbError:
        bar.end(False, "The merged folder is wrong; the differences are shown below.")
        raise
    bar.end(True, f"{count} tensors read back, all as expected.")
    rows = [("tensors compared", str(count)), ("different", "0")]
    return Table(columns=("what", "value"), rows=rows, title="Checked")


def ask_all(choice: MergeChoice, question_file: str = "auto", *, count: int, max_new_tokens: int) -> Table:
    """Shows the greedy answers of base, base with adapter, and merged model while they are written; returns a table.

    Args:
        question_file: JSONL file of conversations; "auto" for the data that the run was trained on.
        count: number of questions, from the beginning of the file; with 0 nothing is asked.
        max_new_tokens: length of the longest answer.

    Raises:
        ConfigError: a count or length that is not valid, or no file to take questions from.
        DataError: a line of the file that is not a conversation.
        ModelError: a folder that is not a model.
    """
    path = choice.train_data_file if question_file == "auto" else question_file
    questions = _check_questions(path, count, max_new_tokens)
    columns = ("question", "answer in the data", *_MODELS, "merged = adapter")
    if count == 0:
        return Table(columns=columns, rows=[], title="No questions were asked: question_count is 0")
    folders = [choice.base_model_path, choice.adapter_model_path, choice.output_path]
    bar = ProgressBar("asking")
    display(bar.box)
    view = AnswerView(_MODELS)
    shown = display(view, display_id=True)
    arguments = {"folders": folders, "questions": questions, "count": count, "max_new_tokens": max_new_tokens}
    try:
        items = [AskedQuestion(**item) for item in work("ask", bar.show, view.show, **arguments)]
    finally:
        view.flush()
        if shown is not None:
            # The saved output has the plain text of the whole answers.
            shown.update(view)
    rows, equal = [], 0
    for item in items:
        _, of_adapter, of_merged = item.answers
        equal += of_adapter == of_merged
        texts = [_shortened(text) for text in (item.question, item.expected, *item.answers)]
        rows.append([*texts, "yes" if of_adapter == of_merged else "NO"])
    bar.end(equal == len(items), f"Merged model and adapter agree on {equal} of {len(items)} answers.")
    title = f"The same questions to all three; merged and adapter agree on {equal} of {len(items)}"
    return Table(columns=columns, rows=rows, title=title)


def _check_questions(path: str | None, count: object, max_new_tokens: object) -> str:
    """The path of the question file; raises ConfigError for everything that is wrong at once."""
    numbers = {"question_count": (count, 0), "max_new_tokens": (max_new_tokens, 1)}
    problems = [
        f"{name} = {value!r}: must be a whole number ≥ {least}"
        for name, (value, least) in numbers.items()
        if not isinstance(value, int) or value < least
    ]
    if path is None or not Path(path).is_file():
        problems.append(f"question_file = {path}: there is no such file; name a JSONL file of conversations")
    if problems or path is None:
        raise ConfigError(problems)
    return path


def _shortened(text: str) -> str:
    if not text:
        return "(empty)"
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"
