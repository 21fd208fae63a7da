"""Time and memory of loading a checkpoint under ZeRO-3: `python benchmarks/loading.py`.

Beside reading the files once with `cat`, and beside transformers' own way; the page cache is dropped before each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
from gpu import drop_page_cache, read_once
from safetensors.torch import save_file

import hynb.hunyuan_large  # noqa: F401  registers the model
from hynb.cluster import free_port
from hynb.config import Config
from hynb.demo import write_tokenizer

EXPERTS, HIDDEN, INTERMEDIATE = 16, 1024, 2048


def make_model(folder: Path, gigabytes: float) -> int:
    """Writes a bf16 model with one shard per layer, holding one shard at a time; returns its bytes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = write_tokenizer(folder, vocab_size=700, samples=500)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": 16}
    sizes |= {"num_key_value_heads": 2, "num_experts": EXPERTS, "moe_topk": 1, "use_cla": True}
    sizes |= {"cla_share_factor": 2, "use_mixed_mlp_moe": True, "use_qk_norm": True, "tie_word_embeddings": True}
    layer_bytes = (EXPERTS + 1) * 3 * HIDDEN * INTERMEDIATE * 2
    layers = max(2, round(gigabytes * 1e9 / layer_bytes))
    config = AutoConfig.for_model("hunyuan", vocab_size=len(tokenizer), num_hidden_layers=layers, **sizes)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parts: dict[int, dict[str, torch.Tensor]] = {}
    for name, weight in model.named_parameters():
        part = parts.setdefault(int(name.split(".")[2]) if ".layers." in name else layers, {})
        dtype = torch.float32 if "gate.wg" in name else torch.bfloat16
        if ".experts." not in name:
            part[name] = torch.empty(weight.shape, dtype=dtype, device="meta")
            continue
        layer = name.split("experts.")[0]
        for expert in range(EXPERTS):
            if name.endswith("gate_up_proj"):
                for half in ("gate", "up"):
                    part[f"{layer}experts.{expert}.{half}_proj.weight"] = weight[expert][:INTERMEDIATE]
            else:
                part[f"{layer}experts.{expert}.down_proj.weight"] = weight[expert]
    names: dict[str, str] = {}
    total = 0
    for number, part in sorted(parts.items()):
        file = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        made = {name: torch.randn(meta.shape, dtype=torch.float32).mul_(0.02) for name, meta in part.items()}
        made = {name: tensor.to(part[name].dtype) for name, tensor in made.items()}
        save_file(made, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(made, file)
        total += sum(tensor.nbytes for tensor in made.values())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def memory_of_self() -> tuple[int, int]:
    """Bytes of this process's own memory, and of the file pages it has mapped, which belong to the page cache."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    own = int(lines["RssAnon"].split()[0]) + int(lines["RssShmem"].split()[0])
    return own << 10, int(lines["RssFile"].split()[0]) << 10


def load(folder: str, preset: str, results: str, way: str) -> None:
    """Runs in each rank: loads the model as a training run does and writes the peaks."""
    from hynb.train import set_up_process

    set_up_process()
    import deepspeed
    from transformers import AutoModelForCausalLM

    from hynb.plan import zero
    from hynb.train import init_process_group, load_model, load_tokenizer, training_arguments

    init_process_group(timedelta(minutes=30))
    config = Config(model_name_or_path=folder, output_dir=results, deepspeed=preset, bf16=True, max_steps=1)
    ds_config = zero.for_machine(zero.load(preset), on_cpu=True)
    tokenizer, _ = load_tokenizer(config, Path(folder))
    # Kept alive: ZeRO-3 is enabled only as long as this object exists.
    args = training_arguments(config, ds_config, evaluates=False)
    assert args.hf_deepspeed_config.is_zero3()
    torch.distributed.barrier()
    before = memory_of_self()
    peak, ended = list(before), threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            for place, value in enumerate(memory_of_self()):
                peak[place] = max(peak[place], value)

    threading.Thread(target=watch, daemon=True).start()
    began = time.monotonic()
    if way == "hynb":
        model = load_model(config, Path(folder), tokenizer)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    seconds = time.monotonic() - began
    ended.set()
    held = sum(weight.ds_tensor.numel() * weight.ds_tensor.element_size() for weight in model.parameters())
    rank = torch.distributed.get_rank()
    found = {"own": peak[0] - before[0], "mapped": peak[1] - before[1], "held": held, "seconds": seconds}
    Path(results, f"{rank}.json").write_text(json.dumps(found))
    deepspeed.comm.barrier()


def run_ranks(folder: Path, preset: str, ranks: int, way: str) -> list[dict[str, float]]:
    """Loads the model on several ranks; what each of them has measured."""
    with tempfile.TemporaryDirectory() as results:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
        command += ["--master_port", str(free_port()), __file__, "--load", str(folder), preset, results, way]
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return [json.loads(Path(results, f"{rank}.json").read_text()) for rank in range(ranks)]


def main() -> None:
    """Prints one line per number of ranks and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=4, help="the first one counts for nothing: memory is new")
    parser.add_argument("--preset", default="ds_zero3_offload")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: at least 2, as the first one counts for nothing")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "model")
        folder.mkdir()
        total = make_model(folder, args.gigabytes)
        block = (3 * EXPERTS * HIDDEN * INTERMEDIATE) * 2
        print(
            f"checkpoint {total / 1e9:.2f} GB, experts of one layer {block / 1e6:.0f} MB; {args.preset}", flush=True
        )
        for ranks in args.ranks:
            seconds: dict[str, list[float]] = {"cat": [], "hynb": [], "transformers": []}
            own: dict[str, list[float]] = {"hynb": [], "transformers": []}
            held = 0.0
            # The three take turns, so that each finds the same memory and disk.
            for _ in range(args.rounds):
                seconds["cat"].append(read_once(folder))
                for way in own:
                    drop_page_cache(folder)
                    found = run_ranks(folder, args.preset, ranks, way)
                    seconds[way].append(max(row["seconds"] for row in found))
                    own[way] += [row["own"] / 1e9 for row in found]
                    held = found[0]["held"] / 1e9
            seconds = {way: values[1:] for way, values in seconds.items()}
            own = {way: values[ranks:] for way, values in own.items()}
            cat = statistics.median(seconds["cat"])
            print(f"{ranks} ranks, a rank's partition {held:.2f} GB; all rounds but the first:")
            for way, values in seconds.items():
                median = statistics.median(values)
                memory = (
                    f"; own memory of a rank at its peak {min(own[way]):.2f} to {max(own[way]):.2f} GB"
                    if way in own
                    else ""
                )
                print(
                    f"  {way}: {' '.join(f'{value:.2f}' for value in values)} s, median {median:.2f} s = "
                    f"{median / cat:.2f} x cat, {total / median / 1e9:.2f} GB/s{memory}",
                    flush=True,
                )
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}")


if __name__ == "__main__":
    if "--load" in sys.argv:
        at = sys.argv.index("--load")
        load(*sys.argv[at + 1 : at + 5])
    else:
        main()
