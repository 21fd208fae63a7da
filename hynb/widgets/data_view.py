"""The training data in a notebook: the report of its check, and samples as the model sees them."""

from __future__ import annotations

from typing import Any

from IPython.display import display

from hynb.config import Config, absolute_paths
from hynb.errors import DataError, HynbError
from hynb.widgets.markup import Shown, block
from hynb.widgets.progress import ProgressBar
from hynb.widgets.tasks import CheckedData, Preview
from hynb.widgets.worker import work


def check_data(config: Config) -> Shown:
    """Checks every line of the training and evaluation data, with a bar, and shows the report.

    The result is cached by the content of the files, and the run that follows uses it.

    Raises:
        DataError: invalid lines, each with file:line, unless `on_bad_sample` is skip; or no sample is left.
        ModelError: the tokenizer cannot be loaded.
    """
    bar = ProgressBar("checking the data")
    display(bar.box)
    try:
        found = work("check_data", on_progress=bar.show, config=_values(config))
    except HynbError as error:
        bar.end(False, error.problems[0])
        raise
    checked = [CheckedData(**item) for item in found]
    invalid = [problem for item in checked for problem in item.problems]
    is_empty = any(item.samples == 0 for item in checked)
    if is_empty or (invalid and config.on_bad_sample == "stop"):
        bar.end(False, "The data cannot be used for training; the reasons are listed below.")
        raise DataError([*invalid, *(["no sample is left to train on"] if is_empty else [])])
    bar.end(True, "The data can be used for training.")
    text = "\n\n".join(item.text for item in checked)
    return Shown(text, block(text))


def sample(config: Config, count: int = 3) -> Shown:
    """The first conversations of the training data as the model sees them: trained tokens marked, token ids on hover.

    Args:
        count: number of conversations.

    Raises:
        DataError: an invalid line, with file:line, unless `on_bad_sample` is skip.
        ModelError: the tokenizer cannot be loaded.
    """
    items = [Preview(**item) for item in work("preview", config=_values(config), count=count)]
    texts = [
        f"{item.source}: {item.tokens} tokens, {item.trained_tokens} trained on (between ⟦ and ⟧)\n{item.text}"
        for item in items
    ]
    # The HTML of a preview is escaped where it is made.
    markup = "".join(f'<div class="hynb-sample">{item.html}</div>' for item in items)
    return Shown("\n\n".join(texts), markup)


def _values(config: Config) -> dict[str, Any]:
    config = absolute_paths(config)
    return config.values() | {"training_args": config.training_args}
