"""How long training stands still for a checkpoint, with `async_save` and without: `python benchmarks/async_save.py`.

LoRA over a small random base on two CPU ranks, with about 1 GB of adapter and optimizer states. Both ways alternate,
in runs of their own; a save is whole (with digests, flushed to the disk) when its event is written.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from tiny import tiny_data, tiny_model

from hynb.config import Config
from hynb.launch import launch
from hynb.runs import RunReader

SAVE_STEPS, SAVES = 6, 3


def events_of_run(files: Path, folder: Path, args: argparse.Namespace, *, background: bool) -> list[dict[str, Any]]:
    """The events of a run that saves three times."""
    config = Config(
        tokenizer_name_or_path=str(files / "model"),
        train_data_file=str(files / "train.jsonl"),
        output_dir=str(folder),
        num_layers=args.layers,
        hidden_size=1024,
        intermediate_size=2048,
        num_attention_heads=8,
        use_lora=True,
        lora_rank=args.lora_rank,
        deepspeed=args.preset,
        num_processes=args.ranks,
        max_steps=SAVE_STEPS * SAVES,
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        max_seq_length=256,
        async_save=background,
    )
    launch(config).wait(timeout_seconds=1800, check=True)
    return RunReader(folder).events()


def main() -> None:
    """Prints one line per way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--lora_rank", type=int, default=1024)
    parser.add_argument("--preset", default="ds_zero2_no_offload")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    stood: dict[bool, list[float]] = {False: [], True: []}
    until_whole: list[float] = []
    steps: dict[str, list[float]] = {"alone": [], "beside a save": []}
    size_bytes = 0
    with tempfile.TemporaryDirectory() as name:
        files = Path(name)
        tiny_model(files / "model", "hunyuan_v1_dense")
        tiny_data(files / "train.jsonl")
        for number in range(args.rounds):
            for background in (False, True):
                folder = files / f"{number}-{background}"
                events = events_of_run(files, folder, args, background=background)
                saves = [event for event in events if event["kind"] == "save"]
                # The last one is completed before the run ends.
                stood[background] += [event["seconds"] for event in saves[:-1]]
                size_bytes = sum(saves[-1]["bytes_by_part"].values())
                if background:
                    until_whole += [event["whole_seconds"] for event in saves[:-1]]
                saving = False
                for event in events:
                    # A checkpoint that is written now; its event follows when it is whole.
                    if event["kind"] == "log" and event["global_step"] > 2:
                        steps["beside a save" if saving else "alone"].append(event["step_seconds"])
                        saving |= background and event["global_step"] % SAVE_STEPS == 0
                    elif event["kind"] == "save":
                        saving = False
    print(f"{args.ranks} ranks, LoRA, {args.preset}: {size_bytes / 1e9:.2f} GB per checkpoint")
    for background, values in stood.items():
        shown = f"{' '.join(f'{value:.2f}' for value in values)} s, median {statistics.median(values):.2f} s"
        print(f"  async_save: {background}: training stands still for {shown}")
    print(f"  in the background: whole after {statistics.median(until_whole):.2f} s, looked at after each step")
    for where, values in steps.items():
        print(f"  a step {where}: median {statistics.median(values or [float('nan')]):.2f} s ({len(values)} steps)")
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, deepspeed {deepspeed.__version__}")


if __name__ == "__main__":
    main()
