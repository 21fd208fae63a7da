"""The whole job with a small model on this machine: `hynb demo` fine-tunes, merges and counts right answers."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hynb.config import Config
from hynb.demo.texts import car_samples, write_jsonl
from hynb.errors import HynbError, RunFailedError
from hynb.extras import require_notebook
from hynb.files import write_json
from hynb.runs import RunReader

BASE = Path(__file__).with_name("base_model")
NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
TRAIN_SAMPLES, HELD_OUT_SAMPLES, SEED = 3000, 200, 7
# What the demo must show; less is a failure.
MOST_BEFORE, LEAST_AFTER = 0.10, 0.80
_ANSWER_TOKENS = 24


@dataclass(kw_only=True, frozen=True)
class DemoFiles:
    """What the demo begins with."""

    base_model_path: Path
    train_data_file: Path
    held_out_file: Path


@dataclass(kw_only=True, frozen=True)
class Evaluation:
    """A model's answers to the held-out questions."""

    answers: list[str]
    right: int

    @property
    def exact_match(self) -> float:
        """Share of answers equal to the expected one, letter by letter."""
        return self.right / len(self.answers)


def write_demo(folder: str | Path, *, train: int = TRAIN_SAMPLES, held_out: int = HELD_OUT_SAMPLES) -> DemoFiles:
    """Unpacks the base model and makes the data into a folder.

    Args:
        train, held_out: conversations; no car of the held-out ones is in a training text.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    files = DemoFiles(
        base_model_path=folder / "base_model",
        train_data_file=folder / "train.jsonl",
        held_out_file=folder / "held_out.jsonl",
    )
    shutil.copytree(BASE, files.base_model_path, dirs_exist_ok=True)
    training, held = car_samples(train, held_out, seed=SEED)
    write_jsonl(files.train_data_file, training)
    write_jsonl(files.held_out_file, held)
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

    Raises:
        ModelError: the folder holds neither.
    """
    from hynb.data import read_conversations
    from hynb.generate import answers, split_answer

    pairs = [split_answer(item.messages) for item in read_conversations(held_out_file)][:limit]
    questions = [messages for messages, _ in pairs]
    given = list(answers(folder, questions, max_new_tokens=_ANSWER_TOKENS, batch_size=50))
    right = sum(text == expected for text, (_, expected) in zip(given, pairs, strict=True))
    return Evaluation(answers=given, right=right)


def run_demo(folder: str | Path = "runs/demo", *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs the three notebooks headless in order and counts right answers before and after.

    Returns:
        what is written to summary.json.

    Raises:
        RunFailedError: a notebook failed, or the demo doesn't show what it must.
    """
    require_notebook()
    folder = Path(folder).absolute()
    if not NOTEBOOKS.is_dir():
        raise HynbError(f"{NOTEBOOKS}: the notebooks are not here; run the demo from a checkout of the project")
    run_dir, merged = folder / "train", folder / "merged"
    seconds: dict[str, float] = {}

    def timed(name: str, act: Callable[[], Any]) -> Any:
        say(f"demo: {name} …")
        started = time.monotonic()
        result = act()
        seconds[name] = round(time.monotonic() - started, 1)
        say(f"demo: {name} took {seconds[name]} s")
        return result

    files = timed("data", lambda: write_demo(folder))
    config = demo_config(files, run_dir)
    values = {
        name: ",".join(value) if isinstance(value, list) else value
        for name, value in config.values().items()
        if value is not None and value != getattr(Config(), name)
    }
    timed("notebook 1", lambda: _execute("01_setup_cluster", folder, {"hostfile": str(folder / "hostfile")}))
    timed("notebook 2", lambda: _execute("02_finetune", folder, values))
    merge = {"run_dir": str(run_dir), "output_path": str(merged), "save_dtype": "fp32"}
    merge |= {"overwrite_output_path": True, "question_file": str(files.held_out_file)}
    timed("notebook 3", lambda: _execute("03_merge_lora", folder, merge))
    reader = RunReader(run_dir)
    adapter = reader.dir.checkpoints()[-1]
    found = timed(
        "evaluation",
        lambda: {
            name: evaluate(path, files.held_out_file)
            for name, path in (("base", files.base_model_path), ("adapter", adapter), ("merged", merged))
        },
    )
    losses = [event["loss"] for event in reader.events() if event["kind"] == "log"]
    summary = {
        "exact_match": {name: item.exact_match for name, item in found.items()},
        "held_out_samples": len(found["base"].answers),
        "merged_equals_adapter": found["merged"].answers == found["adapter"].answers,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "seconds": seconds | {"total": round(sum(seconds.values()), 1)},
        "adapter": str(adapter),
        "merged": str(merged),
    }
    write_json(folder / "summary.json", summary)
    say(json.dumps(summary, indent=1))
    if problems := _missed(summary):
        raise RunFailedError(problems)
    return summary


def _missed(summary: dict[str, Any]) -> list[str]:
    match = summary["exact_match"]
    problems = []
    if match["base"] >= MOST_BEFORE:
        problems.append(f"demo: the base answers {match['base']:.0%} right, it should be below {MOST_BEFORE:.0%}")
    if match["adapter"] < LEAST_AFTER:
        problems.append(f"demo: after training {match['adapter']:.0%} are right; {LEAST_AFTER:.0%} are expected")
    if not summary["merged_equals_adapter"]:
        problems.append("demo: the merged model answers otherwise than base and adapter")
    return problems


def _execute(name: str, folder: Path, values: dict[str, Any]) -> None:
    """Runs a notebook headless, as a CI job would; its output stays beside the summary."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    made = folder / f"{name}.ipynb"
    # The kernel of this environment, whatever kernel of that name the machine has installed elsewhere.
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
    parser.add_argument("--folder", default="runs/demo", help="where everything is written")


def run(args: argparse.Namespace) -> int:
    """`hynb demo`."""
    run_demo(args.folder, say=lambda line: print(line, flush=True))
    return 0
