"""What hynb adds to each step of transformers' Trainer with DeepSpeed: `python benchmarks/overhead.py`.

Both sides train the same model, loaded by hynb, on the same data through hynb's ChatDataset and Collator, with equal
TrainingArguments and DeepSpeed config. hynb's side has in addition RunTrainer with its sampler, RunCallback (events,
status and the flag that stops a run), the routers' statistics and the times and tokens of each step. Loading, making
batches and what runs beside the ranks (supervisor, heartbeat) are not compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from hynb.cluster import free_port
from hynb.config import Config
from hynb.demo.pretrain import write_tokenizer

WARM_UP_STEPS = 5


def make_model(folder: Path) -> None:
    """Writes a MoE model and data with which a step on two idle cores takes about a tenth of a second."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import hynb.hunyuan_large  # noqa: F401  registers the model

    tokenizer = write_tokenizer(folder, vocab_size=700, samples=500)
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_experts": 8, "moe_topk": 1, "use_mixed_mlp_moe": True, "num_hidden_layers": 6}
    config = AutoConfig.for_model("hunyuan", vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    line = {
        "messages": [{"role": "user", "content": "How many? " * 10}, {"role": "assistant", "content": "two " * 40}]
    }
    (folder / "data.jsonl").write_text((json.dumps(line) + "\n") * 400)


def train(folder: str, way: str, steps: str, logging_steps: str, result: str) -> None:
    """Runs in each rank: trains some steps, with hynb's Trainer or with transformers' alone."""
    from hynb.train import set_up_process

    set_up_process()
    from transformers import Trainer, TrainerCallback

    from hynb.data import ChatDataset, Collator, SeededSampler
    from hynb.plan import zero
    from hynb.runs import RunDir, RunWriter
    from hynb.train import (
        Datasets,
        Pace,
        RouterWatch,
        RowParts,
        RunCallback,
        RunTrainer,
        init_process_group,
        load_model,
        load_tokenizer,
        training_arguments,
        watch_of,
    )

    init_process_group(timedelta(minutes=10))
    values: dict[str, Any] = {"model_name_or_path": folder, "output_dir": result, "max_steps": int(steps)}
    values |= {"save_strategy": "no", "logging_steps": int(logging_steps)}
    config = Config(**values, deepspeed="ds_zero2_no_offload")
    ds_config = zero.for_machine(zero.load(config.deepspeed), on_cpu=True)
    tokenizer, tokenizer_folder = load_tokenizer(config, Path(folder))
    arguments = training_arguments(config, ds_config, evaluates=False)
    model = load_model(config, Path(folder), tokenizer)
    model.config.use_cache = False
    dataset = ChatDataset(f"{folder}/data.jsonl", tokenizer, 256)
    times: list[tuple[float, float]] = []

    class Times(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append((time.perf_counter(), time.process_time()))

    rank = torch.distributed.get_rank()
    options: dict[str, Any] = {"model": model, "args": arguments, "train_dataset": dataset}
    options["data_collator"] = Collator(pad_token_id=0, flatten=False)
    if way == "hynb":
        writer = RunWriter(result) if rank == 0 else None
        if writer:
            writer.start()
        sampler = SeededSampler(len(dataset), config.seed)
        callback = RunCallback(run_dir=RunDir(result), writer=writer, model=model, sampler=sampler)
        datasets = Datasets(train=dataset, evaluation=None, lengths=None)
        parts = RowParts(rank=rank, world_size=torch.distributed.get_world_size())
        trainer: Trainer = RunTrainer(
            **options,
            sampler=sampler,
            routers=RouterWatch(model, "hunyuan", 0.0),
            callbacks=[callback, Times()],
            config=config,
            base=Path(folder),
            shards=[],
            tokenizer_folder=tokenizer_folder,
            record={},
            checkpoint_bytes=0,
            writer=writer,
            pace=Pace(),
            watch=watch_of(config, datasets, sampler, parts, writer),
            folders=None,
        )
    else:
        trainer = Trainer(**options, callbacks=[Times()])
    trainer.train()
    if rank == 0:
        measured = times[WARM_UP_STEPS:]
        seconds = [after[0] - before[0] for before, after in itertools.pairwise(measured)]
        # The mean, as with a log event every ten steps the median step has none.
        cpu = (measured[-1][1] - measured[0][1]) / len(seconds)
        found = {"step": statistics.median(seconds), "mean": statistics.mean(seconds), "cpu": cpu}
        Path(result, "found.json").write_text(json.dumps(found))
        if way == "hynb":
            writer.close()  # type: ignore[union-attr]
    torch.distributed.barrier()


def run(folder: Path, result: Path, way: str, steps: int, logging_steps: int) -> dict[str, float]:
    """Trains on two ranks; rank 0's median and mean seconds of a step, and its CPU seconds per step."""
    result.mkdir()
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    command += ["--master_port", str(free_port()), __file__, "--train", str(folder), way, str(steps)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command += [str(logging_steps), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((result / "found.json").read_text())


def print_differences(rounds: list[dict[str, dict[str, float]]]) -> None:
    """Prints per quantity the median of the differences within rounds, and their range."""
    for name, title in (("step", "median step"), ("mean", "mean step"), ("cpu", "CPU time per step")):
        theirs = statistics.median(found["transformers"][name] for found in rounds)
        added = [found["hynb"][name] - found["transformers"][name] for found in rounds]
        middle, least, most = statistics.median(added), min(added), max(added)
        print(
            f"  {title}: transformers {theirs * 1e3:.2f} ms; hynb adds {middle * 1e3:+.2f} ms "
            f"({middle / theirs:+.1%}), in the rounds {least * 1e3:+.2f} to {most * 1e3:+.2f} ms",
            flush=True,
        )


def main() -> None:
    """Prints what each round has measured, and the differences within rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help=f"of a run; the first {WARM_UP_STEPS} are not counted")
    parser.add_argument("--logging_steps", type=int, nargs="+", default=[1, 10], help="1 is hynb's default")
    args = parser.parse_args()
    if args.steps < WARM_UP_STEPS + 2:
        parser.error(
            f"--steps {args.steps}: at least {WARM_UP_STEPS + 2}, as the first {WARM_UP_STEPS} are not counted"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "model")
        folder.mkdir()
        make_model(folder)
        for logging_steps in args.logging_steps:
            rounds: list[dict[str, dict[str, float]]] = []
            print(f"--logging_steps {logging_steps}")
            for number in range(args.rounds):
                found: dict[str, dict[str, float]] = {}
                # The order alternates, as the load of the machine changes.
                for way in sorted(("hynb", "transformers"), reverse=bool(number % 2)):
                    result = Path(name, f"{way}-{logging_steps}-{number}")
                    found[way] = run(folder, result, way, args.steps, logging_steps)
                    step, _, cpu = (value * 1e3 for value in found[way].values())
                    print(f"  round {number + 1}, {way}: median step {step:.1f} ms, CPU {cpu:.1f} ms", flush=True)
                rounds.append(found)
            print_differences(rounds)
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}")


if __name__ == "__main__":
    if "--train" in sys.argv:
        at = sys.argv.index("--train")
        train(*sys.argv[at + 1 : at + 6])
    else:
        main()
