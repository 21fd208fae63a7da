"""What a run will do, shown before it starts: a sample as it is trained on, DeepSpeed's JSON, commands."""

from __future__ import annotations

import html
import json
import shlex
from typing import Any

from IPython.display import display

from hynb.cluster import gpu_count
from hynb.config import Config, absolute_paths, parameters, value_text
from hynb.errors import DataError, HynbError
from hynb.plan import zero
from hynb.runs import RunReader, check_run
from hynb.supervision import command_text
from hynb.widgets.progress import ProgressBar
from hynb.widgets.table import STYLE, block
from hynb.widgets.worker import work


class Shown:
    """Something that a notebook shows as HTML and a saved or headless one as plain text."""

    def __init__(self, text: str, markup: str) -> None:
        self.text = text
        self._markup = markup

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return f'{STYLE}<div class="hynb">{self._markup}</div>'


def check_data(config: Config) -> Shown:
    """Every line of the training and evaluation data, before a GPU is touched: broken lines, lengths, what is cut.

    The result is kept by content, and the run that follows takes it from there.

    Raises:
        DataError: broken lines, each with file:line, unless `on_bad_sample` is skip.
        ModelError: there is no tokenizer.
    """
    progress = ProgressBar("checking the data")
    display(progress.box)
    try:
        found = work("check_data", on_progress=progress.report, config=_arguments(config))
    except HynbError as error:
        progress.end(False, html.escape(error.problems[0]))
        raise
    text = "\n\n".join(item["text"] for item in found)
    broken = [problem for item in found for problem in item["problems"]]
    empty = any(not item["samples"] for item in found)
    if empty or (broken and config.on_bad_sample == "stop"):
        progress.end(False, "The data cannot be trained on; the lines below say why.")
        raise DataError([*broken, *(["no sample is left to train on"] if empty else [])])
    progress.end(True, "The data can be trained on.")
    return Shown(text, block(text))


def sample(config: Config, count: int = 3) -> Shown:
    """The first conversations of the training data as the model sees them: trained tokens marked, ids on hover.

    Tokenizing needs transformers, which runs in a process of its own.

    Raises:
        DataError: a line that is no conversation, with file:line.
        ModelError: there is no tokenizer.
    """
    texts, markup = [], ""
    for item in work("preview", config=_arguments(config), count=count):
        head = f"{item['source']}: {item['tokens']} tokens, {item['trained_tokens']} of them trained on"
        texts.append(f"{head} (between ⟦ and ⟧)\n{item['text']}")
        markup += f'<div class="hynb-sample">{item["html"]}</div>'
    return Shown("\n\n".join(texts), markup)


def _arguments(config: Config) -> dict[str, Any]:
    config = absolute_paths(config)
    return config.values() | {"training_args": config.training_args}


def deepspeed_plan(config: Config) -> Shown:
    """DeepSpeed's JSON, and the command that starts the same run from a terminal.

    Raises:
        ConfigError: everything that would keep the run from starting, at once.
    """
    config = absolute_paths(config)
    if RunReader(config.output_dir).status().state == "absent":
        check_run(config)
    text = json.dumps(zero.for_machine(zero.load(config.deepspeed), on_cpu=not gpu_count()), indent=2)
    command = terminal_command(config)
    parts = {
        '"auto" is filled in from the other parameters when the run starts': text,
        "The same run from a terminal": command,
        "It starts the ranks with": command_text(config),
    }
    plain = "\n\n".join(f"# {title}\n{content}" for title, content in parts.items())
    markup = "".join(f"<b>{title}</b>{block(content)}" for title, content in parts.items())
    return Shown(plain, markup)


def terminal_command(config: Config) -> str:
    """`hynb launch` with every parameter that differs from its default."""
    changed: dict[str, Any] = {
        item.name: getattr(config, item.name) for item in parameters() if getattr(config, item.name) != item.default
    }
    changed |= config.training_args
    # A number is written with all of its digits, so that the run is the same.
    texts = {name: repr(value) if isinstance(value, float) else value_text(value) for name, value in changed.items()}
    words = [f"--set {shlex.quote(f'{name}={text}')}" for name, text in texts.items()]
    return " \\\n  ".join(["hynb launch", *words])
