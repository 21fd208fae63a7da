"""The whole job with a small model on this machine: `hynb demo` fine-tunes, merges and counts correct answers."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hynb.config import Config
from hynb.demo.texts import car_samples, write_jsonl
from hynb.errors import HynbError, RunFailedError
from hynb.extras import require_notebook
from hynb.files import write_json
from hynb.runs import RunReader

BASE = Path(__file__).with_name("base_model")
NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
TRAIN_SAMPLES, HELD_OUT_SAMPLES, SEED = 3000, 200, 7
# The demo fails unless the base answers fewer of the questions correctly, and the adapter more.
MAX_BASE_EXACT_MATCH, MIN_ADAPTER_EXACT_MATCH = 0.10, 0.80
# The longest answer of the data has fewer tokens.
_ANSWER_TOKENS = 24
_BATCH_SIZE = 50
_Result = TypeVar("_Result")


@dataclass(kw_only=True, frozen=True)
class DemoFiles:
    """The base model and the data of the demo."""

    base_model_path: Path
    train_data_file: Path
    held_out_file: Path


@dataclass(kw_only=True, frozen=True)
class Evaluation:
    """A model's answers to the held-out questions.

    Args:
        correct: number of answers that are equal to the expected ones.
    """

    answers: list[str]
    correct: int

    @property
    def exact_match(self) -> float:
        """Fraction of the answers that are equal to the expected ones."""
        return self.correct / len(self.answers)


@dataclass(kw_only=True)
class _Steps:
    """The steps of the demo so far, with the seconds that each took."""

    report: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, name: str, step: Callable[[], _Result]) -> _Result:
        """Runs a step and returns its result."""
        self.report(f"demo: {name} …")
        started = time.monotonic()
        result = step()
        self.seconds[name] = round(time.monotonic() - started, 1)
        self.report(f"demo: {name} took {self.seconds[name]} s")
        return result


def write_demo(folder: str | Path, *, train: int = TRAIN_SAMPLES, held_out: int = HELD_OUT_SAMPLES) -> DemoFiles:
    """Copies the base model and writes the data into a folder.

    Args:
        train, held_out: number of conversations; no car of a held-out one is in a training text.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    files = DemoFiles(
        base_model_path=folder / "base_model",
        train_data_file=folder / "train.jsonl",
        held_out_file=folder / "held_out.jsonl",
    )
    shutil.copytree(BASE, files.base_model_path, dirs_exist_ok=True)
    train_samples, held_out_samples = car_samples(train, held_out, seed=SEED)
    write_jsonl(files.train_data_file, train_samples)
    write_jsonl(files.held_out_file, held_out_samples)
    return files


def demo_config(files: DemoFiles, output_dir: str | Path) -> Config:
    """The demo's training: LoRA on the attention, two ranks."""
    return Config(
        model_name_or_path=str(files.base_model_path),
        train_data_file=str(files.train_data_file),
        output_dir=str(output_dir),
        overwrite_output_dir=True,
        use_lora=True,
        lora_rank=16,
        lora_alpha=32,
        lora_dropout=0.0,
        max_seq_length=256,
        per_device_train_batch_size=16,
        max_steps=160,
        learning_rate=5e-3,
        min_lr=2e-4,
        warmup_ratio=0.05,
        save_steps=80,
        num_processes=2,
    )


def evaluate(folder: str | Path, held_out_file: str | Path, *, limit: int | None = None) -> Evaluation:
    """Asks a model, or an adapter with its base, the held-out questions.

    Args:
        folder: of the model or the adapter.
        limit: number of questions; None for all.

    Raises:
        ModelError: the folder is neither a model's nor an adapter's.
    """
    from hynb.data import read_conversations
    from hynb.generate import answers, question_of

    conversations = list(read_conversations(held_out_file))[:limit]
    questions = [question_of(conversation) for conversation in conversations]
    found = answers(folder, questions, max_new_tokens=_ANSWER_TOKENS, batch_size=_BATCH_SIZE)
    given = [answer.text for answer in found]
    expected = [conversation.messages[-1]["content"] for conversation in conversations]
    correct = sum(text == right for text, right in zip(given, expected, strict=True))
    return Evaluation(answers=given, correct=correct)


def run_demo(folder: str | Path = "runs/demo", *, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs the three notebooks headless, one after the other, and counts correct answers before and after.

    Args:
        folder: where everything is written.
        report: called with a line for each step.

    Returns:
        the content of summary.json.

    Raises:
        HynbError: the notebooks or Jupyter are not installed.
        RunFailedError: a notebook failed, or the models do not answer as they must.
    """
    require_notebook()
    folder = Path(folder).absolute()
    if not NOTEBOOKS.is_dir():
        raise HynbError(f"{NOTEBOOKS}: there are no notebooks; run the demo from a checkout of the project")
    run_dir, merged = folder / "train", folder / "merged"
    steps = _Steps(report=report)
    files = steps.run("data", lambda: write_demo(folder))
    _run_notebooks(steps, folder, files, run_dir, merged)
    reader = RunReader(run_dir)
    models = {"base": files.base_model_path, "adapter": reader.dir.checkpoints()[-1], "merged": merged}
    evaluations = steps.run(
        "evaluation", lambda: {name: evaluate(path, files.held_out_file) for name, path in models.items()}
    )
    losses = [event["loss"] for event in reader.events() if event["kind"] == "log"]
    summary = {
        "exact_match": {name: item.exact_match for name, item in evaluations.items()},
        "held_out_samples": len(evaluations["base"].answers),
        "merged_equals_adapter": evaluations["merged"].answers == evaluations["adapter"].answers,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "seconds": steps.seconds | {"total": round(sum(steps.seconds.values()), 1)},
        "adapter": str(models["adapter"]),
        "merged": str(merged),
    }
    write_json(folder / "summary.json", summary)
    report(json.dumps(summary, indent=1))
    if problems := summary_problems(summary):
        raise RunFailedError(problems)
    return summary


def summary_problems(summary: dict[str, Any]) -> list[str]:
    """What the demo must show and does not, as messages; empty if it shows everything."""
    match = summary["exact_match"]
    problems = []
    if match["base"] >= MAX_BASE_EXACT_MATCH:
        problems.append(
            f"demo: the base answers {match['base']:.0%} of the questions correctly; it must be below "
            f"{MAX_BASE_EXACT_MATCH:.0%}"
        )
    if match["adapter"] < MIN_ADAPTER_EXACT_MATCH:
        problems.append(
            f"demo: the adapter answers {match['adapter']:.0%} of the questions correctly; it must be at least "
            f"{MIN_ADAPTER_EXACT_MATCH:.0%}"
        )
    if not summary["merged_equals_adapter"]:
        problems.append("demo: the merged model answers differently from base and adapter")
    return problems


def run_notebook(name: str, folder: Path, values: dict[str, Any]) -> None:
    """Runs a notebook headless, as a CI job would.

    Args:
        name: of the notebook, without its ending.
        folder: the working directory, where the notebook with its outputs is written.
        values: its parameters.

    Raises:
        RunFailedError: a cell failed.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    made = folder / f"{name}.ipynb"
    # The kernel of this environment, whatever kernel of that name is installed elsewhere on the machine.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    try:
        papermill.execute_notebook(
            NOTEBOOKS / f"{name}.ipynb", made, parameters=values, cwd=folder, progress_bar=False
        )
    except PapermillExecutionError as error:
        raise RunFailedError(f"{made}: cell {error.exec_count} failed: {error.ename}: {error.evalue}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `hynb demo`."""
    parser.description = "Train, merge and evaluate a small model on this machine, in about a minute on two cores."
    parser.add_argument("--folder", default="runs/demo", help="where everything is written [runs/demo]")


def run(args: argparse.Namespace) -> int:
    """Runs the demo and prints its steps and its summary."""
    run_demo(args.folder, report=lambda line: print(line, flush=True))
    return 0


def _run_notebooks(steps: _Steps, folder: Path, files: DemoFiles, run_dir: Path, merged: Path) -> None:
    default = Config()
    training = {
        name: ",".join(value) if isinstance(value, list) else value
        for name, value in demo_config(files, run_dir).values().items()
        if value is not None and value != getattr(default, name)
    }
    merging = {
        "run_dir": str(run_dir),
        "output_path": str(merged),
        "save_dtype": "fp32",
        "overwrite_output_path": True,
        "question_file": str(files.held_out_file),
    }
    notebooks = {
        "01_setup_cluster": {"hostfile": str(folder / "hostfile")},
        "02_finetune": training,
        "03_merge_lora": merging,
    }
    for number, (name, values) in enumerate(notebooks.items(), 1):
        steps.run(f"notebook {number}", lambda name=name, values=values: run_notebook(name, folder, values))
