"""Seconds from a launch to the first training step: `hynb`'s supervised launch against the bare `deepspeed` command.

    python benchmarks/startup.py [--rounds 5] [--ranks 2]

Both train the same tiny model; the rounds alternate, so that a noisy machine hits both alike.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from tiny import tiny_data, tiny_model

from hynb.config import Config, to_yaml
from hynb.launch import launch
from hynb.runs import RunReader


def config_of(files: Path, folder: Path, ranks: int) -> Config:
    return Config(
        model_name_or_path=str(files / "model"),
        train_data_file=str(files / "train.jsonl"),
        output_dir=str(folder),
        num_processes=ranks,
        max_steps=2,
        max_seq_length=256,
        save_strategy="no",
    )


def first_step_seconds(folder: Path, started: float) -> float:
    """Seconds until the first log event was written."""
    return next(event["time"] for event in RunReader(folder).events() if event["kind"] == "log") - started


def supervised(config: Config) -> float:
    started = time.time()
    launch(config).wait(timeout_seconds=600, check=True)
    return first_step_seconds(Path(config.output_dir), started)


def bare(config: Config) -> float:
    folder = Path(config.output_dir)
    file = folder.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(config.num_processes)]
    started = time.time()
    subprocess.run([*command, "--module", "hynb.train_entry", str(file)], check=True, capture_output=True)
    return first_step_seconds(folder, started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="hynb-startup-"))
    try:
        tiny_model(folder / "model", "hunyuan_v1_dense")
        tiny_data(folder / "train.jsonl")
        seconds: dict[str, list[float]] = {"bare deepspeed": [], "hynb launch": []}
        for number in range(args.rounds):
            seconds["bare deepspeed"].append(bare(config_of(folder, folder / f"bare{number}", args.ranks)))
            seconds["hynb launch"].append(supervised(config_of(folder, folder / f"run{number}", args.ranks)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("| start | median s | fastest s |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} |")
    medians = [statistics.median(values) for values in seconds.values()]
    print(f"\nhynb launch - bare deepspeed: {medians[1] - medians[0]:+.2f} s ({medians[1] / medians[0]:.2f}x)")


if __name__ == "__main__":
    main()
