"""Time and memory of saving a full model under ZeRO-3: `python benchmarks/saving.py`.

Beside `cp` of the same bytes, and beside transformers' own way, which gathers the model on rank 0. Digests and fsync,
which every checkpoint gets, are measured by themselves: `seal`, and `fsync` of the copy of the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from loading import make_model, memory_of_self

from hynb.cluster import free_port
from hynb.config import Config


def save(folder: str, results: str, rounds: str) -> None:
    """Runs in each rank: loads a model and saves it in both ways, several times."""
    from hynb.train import set_up_process

    set_up_process()
    import deepspeed

    from hynb.plan import zero
    from hynb.runs import checkpoint_files, flush
    from hynb.train import (
        ByteProgress,
        base_tensors,
        init_process_group,
        load_model,
        load_tokenizer,
        plan_shards,
        training_arguments,
    )
    from hynb.train.adapter import freeze_all_but_attention
    from hynb.train.saving import write_model
    from hynb.train.sealing import Sealing

    init_process_group(timedelta(minutes=30))
    config = Config(
        model_name_or_path=folder, output_dir=results, deepspeed="ds_zero3_offload", bf16=True, max_steps=1
    )
    ds_config = zero.for_machine(zero.load(config.deepspeed), on_cpu=True)
    # Kept alive: ZeRO-3 is enabled only as long as this object exists.
    args = training_arguments(config, ds_config, evaluates=False)
    assert args.hf_deepspeed_config.is_zero3()
    tokenizer, _ = load_tokenizer(config, Path(folder))
    model: Any = load_model(config, Path(folder), tokenizer)
    # All weights count as trained here, so that every tensor is written from memory.
    shards = plan_shards(model, base_tensors(Path(folder)), [], dtype=torch.bfloat16, has_index=True)
    freeze_all_but_attention(model)
    settings = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_allow_untested_optimizer": True}
    settings["zero_optimization"] = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=0.1), config=settings)
    rank = torch.distributed.get_rank()

    def by_all_ranks() -> None:
        progress = ByteProgress("saving")
        write_model(model, shards, Path(results, "hynb"), shared=True, progress=progress)

    def by_seal() -> None:
        sealing = Sealing(Path(results, "hynb"), range(torch.distributed.get_world_size()), flushes=rank == 0)
        sealing.work()
        sealing.digests()

    def by_fsync() -> None:
        if rank == 0:
            flush(Path(results, "copy"), checkpoint_files(Path(results, "copy")))

    def by_cp() -> None:
        if rank == 0:
            subprocess.run(["cp", "-r", str(Path(results, "hynb")), str(Path(results, "copy"))], check=True)

    def by_transformers() -> None:
        weights = engine._zero3_consolidated_16bit_state_dict()
        if rank == 0:
            model.save_pretrained(Path(results, "transformers"), state_dict=weights)
        torch.distributed.barrier()

    # The ways take turns with `cp`, which rank 0 starts, so that each finds the same memory and disk.
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ("hynb", "transformers", "cp", "seal", "fsync")}
    for _ in range(int(rounds)):
        for way, work in (
            *(("hynb", by_all_ranks), ("cp", by_cp), ("seal", by_seal), ("fsync", by_fsync)),
            ("transformers", by_transformers),
        ):
            found[way].append(measured(work))
            torch.distributed.barrier()
        if rank == 0:
            total = sum(path.stat().st_size for path in Path(results, "hynb").iterdir())
            Path(results, "bytes.json").write_text(json.dumps(total))
            for way in ("hynb", "copy", "transformers"):
                shutil.rmtree(Path(results, way))
        torch.distributed.barrier()
    Path(results, f"{rank}.json").write_text(json.dumps(found))
    deepspeed.comm.barrier()


def measured(work: Callable[[], None]) -> dict[str, float]:
    """Seconds, and the peak of this process's own memory above its start in bytes."""
    torch.distributed.barrier()
    before, ended = memory_of_self()[0], threading.Event()
    peak = [before]

    def watch() -> None:
        while not ended.wait(0.01):
            peak[0] = max(peak[0], memory_of_self()[0])

    threading.Thread(target=watch, daemon=True).start()
    began = time.monotonic()
    work()
    seconds = time.monotonic() - began
    ended.set()
    return {"seconds": seconds, "peak": peak[0] - before}


def main() -> None:
    """Prints one line per round and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=4, help="the first one counts for nothing: memory is new")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "model")
        folder.mkdir()
        make_model(folder, args.gigabytes)
        for ranks in args.ranks:
            results = Path(name, "results")
            results.mkdir()
            command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
            command += ["--master_port", str(free_port()), __file__, "--save", str(folder), str(results)]
            environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            done = subprocess.run([*command, str(args.rounds)], capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            found = [json.loads((results / f"{rank}.json").read_text()) for rank in range(ranks)]
            total = json.loads((results / "bytes.json").read_text())
            seconds = {
                way: [max(row[way][number]["seconds"] for row in found) for number in range(1, args.rounds)]
                for way in found[0]
            }
            copied = statistics.median(seconds["cp"])
            print(f"{ranks} ranks, {total / 1e9:.2f} GB; all rounds but the first:")
            for way, all_seconds in seconds.items():
                median = statistics.median(all_seconds)
                peaks = [max(item["peak"] for item in row[way]) / 1e6 for row in found]
                print(
                    f"  {way}: {' '.join(f'{value:.2f}' for value in all_seconds)} s, median {median:.2f} s = "
                    f"{median / copied:.2f} x cp; extra memory of a rank {min(peaks):.0f} to {max(peaks):.0f} MB",
                    flush=True,
                )
            shutil.rmtree(results)
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}")


if __name__ == "__main__":
    if "--save" in sys.argv:
        at = sys.argv.index("--save")
        save(*sys.argv[at + 1 : at + 4])
    else:
        main()
