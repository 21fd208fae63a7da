"""What a run will do, shown before it starts: a sample as it is trained on, DeepSpeed's JSON, commands."""

from __future__ import annotations

import html
import json
import shlex
from typing import Any

from hynb import zero
from hynb.config import Config, parameters, value_text
from hynb.launch import absolute_paths, command_text, gpu_count
from hynb.run_checks import check_run
from hynb.run_dir import RunReader
from hynb.widgets.table import STYLE, block
from hynb.worker import work


class Shown:
    """Something that a notebook shows as HTML and a saved or headless one as plain text."""

    def __init__(self, text: str, markup: str) -> None:
        self.text = text
        self._markup = markup

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return f'{STYLE}<div class="hynb">{self._markup}</div>'


def sample(config: Config, count: int = 1) -> Shown:
    """The first conversations of the training data as the model sees them, the trained part marked.

    Tokenizing needs transformers, which runs in a process of its own.

    Raises:
        DataError: a line that is no conversation, with file:line.
        ModelError: there is no tokenizer.
    """
    config = absolute_paths(config)
    arguments = config.values() | {"training_args": config.training_args}
    texts, markup = [], ""
    for item in work("preview", config=arguments, count=count):
        head = f"{item['source']}: {item['tokens']} tokens, {item['trained_tokens']} of them trained on"
        texts.append(f"{head} (between ⟦ and ⟧)\n{item['text']}")
        marked = block(item["text"]).replace("⟦", "<mark>").replace("⟧", "</mark>")
        markup += f"<b>{html.escape(head)}</b> (marked){marked}"
    return Shown("\n".join(texts), markup)


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
