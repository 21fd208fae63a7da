"""What hynb adds to each step of transformers' Trainer with DeepSpeed: `python benchmarks/overhead.py`."""

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
    """Writes a MoE model and data with which a step on two CPU ranks takes about a tenth of a second."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import hynb.hunyuan_large  # noqa: F401  registers the model

    tokenizer = write_tokenizer(folder, vocab_size=700, samples=500)
    sizes = {"hidden_size": 192, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_experts": 8, "moe_topk": 1, "use_mixed_mlp_moe": True, "num_hidden_layers": 6}
    config = AutoConfig.for_model("hunyuan", vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    line = {
        "messages": [{"role": "user", "content": "How many? " * 10}, {"role": "assistant", "content": "two " * 40}]
    }
    (folder / "data.jsonl").write_text((json.dumps(line) + "\n") * 400)


def train(folder: str, way: str, steps: str, result: str) -> None:
    """Runs in each rank: trains some steps, with hynb's Trainer or with transformers' alone."""
    from hynb.train import set_up_process

    set_up_process()
    from transformers import Trainer, TrainerCallback

    from hynb.data import ChatDataset, Collator, SeededSampler
    from hynb.plan import zero
    from hynb.runs import RunDir, RunWriter
    from hynb.train import (
        Pace,
        RouterWatch,
        RunCallback,
        RunTrainer,
        init_process_group,
        load_model,
        load_tokenizer,
        training_arguments,
    )

    init_process_group(timedelta(minutes=10))
    values: dict[str, Any] = {"model_name_or_path": folder, "output_dir": result, "max_steps": int(steps)}
    config = Config(**values, save_strategy="no", logging_steps=10, deepspeed="ds_zero2_no_offload")
    ds_config = zero.for_machine(zero.load(config.deepspeed), on_cpu=True)
    tokenizer, tokenizer_folder = load_tokenizer(config, Path(folder))
    arguments = training_arguments(config, ds_config, evaluates=False)
    model = load_model(config, Path(folder), tokenizer)
    model.config.use_cache = False
    dataset = ChatDataset(f"{folder}/data.jsonl", tokenizer, 256)
    times: list[float] = []

    class Times(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    rank = torch.distributed.get_rank()
    options: dict[str, Any] = {"model": model, "args": arguments, "train_dataset": dataset}
    options["data_collator"] = Collator(pad_token_id=0, flatten=False)
    if way == "hynb":
        writer = RunWriter(result) if rank == 0 else None
        if writer:
            writer.start()
        sampler = SeededSampler(len(dataset), config.seed)
        callback = RunCallback(run_dir=RunDir(result), writer=writer, model=model, sampler=sampler)
        trainer: Trainer = RunTrainer(
            **options,
            sampler=sampler,
            routers=RouterWatch(model, "hunyuan", 0.0),
            callbacks=[callback, Times()],
            base=Path(folder),
            shards=[],
            tokenizer_folder=tokenizer_folder,
            record={},
            keep_checkpoints=None,
            save_minutes=None,
            writer=writer,
            pace=Pace(),
            folders=None,
        )
    else:
        trainer = Trainer(**options, callbacks=[Times()])
    trainer.train()
    if rank == 0:
        seconds = [after - before for before, after in itertools.pairwise(times)]
        Path(result, "seconds.json").write_text(json.dumps(seconds[WARM_UP_STEPS:]))
        if way == "hynb":
            writer.close()  # type: ignore[union-attr]
    torch.distributed.barrier()


def main() -> None:
    """Prints the median step of both, and the difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    found: dict[str, list[float]] = {"hynb": [], "transformers": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "model")
        folder.mkdir()
        make_model(folder)
        for number in range(args.rounds):
            # The order alternates, as the load of the machine changes.
            for way in sorted(found, reverse=bool(number % 2)):
                result = Path(name, f"{way}-{number}")
                result.mkdir()
                command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
                command += ["--master_port", str(free_port()), __file__, "--train", str(folder), way, str(args.steps)]
                environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
                done = subprocess.run([*command, str(result)], capture_output=True, text=True, env=environment)
                assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
                seconds = json.loads((result / "seconds.json").read_text())
                found[way] += seconds
                print(f"round {number + 1}, {way}: median step {statistics.median(seconds) * 1e3:.1f} ms", flush=True)
    ours, theirs = (statistics.median(found[way]) for way in ("hynb", "transformers"))
    fastest = [sorted(found[way])[len(found[way]) // 10] for way in ("hynb", "transformers")]
    print(f"median: {ours * 1e3:.2f} and {theirs * 1e3:.2f} ms, {ours / theirs - 1:+.1%}")
    print(f"fastest tenth: {fastest[0] * 1e3:.2f} and {fastest[1] * 1e3:.2f} ms, {fastest[0] / fastest[1] - 1:+.1%}")
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}")


if __name__ == "__main__":
    if "--train" in sys.argv:
        at = sys.argv.index("--train")
        train(*sys.argv[at + 1 : at + 5])
    else:
        main()
