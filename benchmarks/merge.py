"""Merging compared with `cp -r` of the same folder: `python benchmarks/merge.py [--gigabytes 8] [FOLDER]`."""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# Proportions like Hunyuan-Large's: nearly all bytes are in the experts.
HIDDEN, EXPERTS, HEADS, KV_HEADS, HEAD_DIM, RANK = 2048, 16, 16, 4, 128, 64
MERGE = """
import re, sys, time
from pathlib import Path
# Not ru_maxrss: it survives exec, so it would report the peak of the benchmark that started this process.
peak_bytes = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
began = time.monotonic()
from hynb.merge import merge_lora
imported, busy = time.monotonic(), time.process_time()
idle = peak_bytes()
result = merge_lora(base_model_path=sys.argv[1], adapter_model_path=sys.argv[2], output_path=sys.argv[3],
                    save_dtype=sys.argv[4], link="link" in sys.argv)
merged, busy = time.monotonic(), time.process_time() - busy
peak = peak_bytes()
if "verify" in sys.argv:
    from hynb.merge import verify_merge
    verify_merge(sys.argv[3])
print(merged - imported, imported - began, idle, peak, time.monotonic() - merged, busy)
"""


def make_base(folder: Path, gigabytes: float, layers: int = 8) -> None:
    """Writes a bf16 model of about the given size with one shard per layer."""
    folder.mkdir(parents=True)
    width = int(gigabytes * 1e9 / 2 / layers / ((EXPERTS + 1) * 3 * HIDDEN)) // 64 * 64
    weight_map, total = {}, 0
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        # Repeats one random block: generating 16 GB of random numbers takes longer than all merges.
        block = torch.randn(min(1 << 22, shape[0] * shape[1]), generator=generator).to(torch.bfloat16)
        count = shape[0] * shape[1]
        return block.repeat(-(-count // len(block)))[:count].view(shape).clone()

    for layer in range(layers):
        name, shard = f"model.layers.{layer}", f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        tensors = {
            f"{name}.self_attn.q_proj.weight": noise(HEADS * HEAD_DIM, HIDDEN),
            f"{name}.self_attn.o_proj.weight": noise(HIDDEN, HEADS * HEAD_DIM),
        }
        if layer % 2 == 0:
            for part in ("k", "v"):
                tensors[f"{name}.self_attn.{part}_proj.weight"] = noise(KV_HEADS * HEAD_DIM, HIDDEN)
        for expert in [*(f"experts.{index}" for index in range(EXPERTS)), "shared_mlp"]:
            for part, shape in (("gate", (width, HIDDEN)), ("up", (width, HIDDEN)), ("down", (HIDDEN, width))):
                tensors[f"{name}.mlp.{expert}.{part}_proj.weight"] = noise(*shape)
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        total += sum(tensor.numel() * 2 for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "hunyuan", "dtype": "bfloat16", "num_hidden_layers": layers})
    )


def make_adapter(folder: Path, base: Path, only: str = "") -> int:
    """Writes LoRA r=64 on q, k, v, o of the layers whose names contain `only`.

    Returns:
        float32 bytes of the largest changed tensor.
    """
    folder.mkdir()
    largest, tensors = 0, {}
    names = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    for name in names:
        if ".self_attn." not in name or only not in name:
            continue
        out = KV_HEADS * HEAD_DIM if "k_proj" in name or "v_proj" in name else HEADS * HEAD_DIM
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, HIDDEN) * 0.01
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, RANK) * 0.01
        largest = max(largest, out * HIDDEN * 4)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return largest


def make_expert_adapter(folder: Path, base: Path) -> None:
    """Writes LoRA r=64 on the fused parameters of all routed experts, as PEFT saves `target_parameters`."""
    folder.mkdir()
    tensors = {}
    for shard in sorted(base.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            names = [name for name in file.keys() if name.endswith(".experts.0.gate_proj.weight")]  # noqa: SIM118
            for name in names:
                width = file.get_slice(name).get_shape()[0]
                experts = f"base_model.model.{name.removesuffix('.0.gate_proj.weight')}"
                for module, out, inner in ((experts, HIDDEN, width), (f"{experts}.base_layer", 2 * width, HIDDEN)):
                    tensors[f"{module}.lora_A.weight"] = torch.randn(EXPERTS * RANK, inner) * 0.01
                    tensors[f"{module}.lora_B.weight"] = torch.randn(out, EXPERTS * RANK) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def copied(base: Path, target: Path) -> float:
    """Seconds of `cp -r` without flushing to disk, as for the merge."""
    began = time.monotonic()
    subprocess.run(["cp", "-r", base, target], check=True)
    seconds = time.monotonic() - began
    shutil.rmtree(target)
    return seconds


def merged(
    base: Path, adapter: Path, target: Path, dtype: str, *more: str
) -> tuple[float, float, int, int, float, float]:
    """Seconds of merge and imports, bytes after the imports and at the peak, seconds to verify, CPU time."""
    command = [sys.executable, "-c", MERGE, str(base), str(adapter), str(target), dtype, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, imports, idle, peak, verify, busy = map(float, done.stdout.split())
    shutil.rmtree(target)
    return seconds, imports, int(idle), int(peak), verify, busy


def main() -> None:
    """Prints one line per comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[8.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("folder", nargs="?", help="a folder on the disk to measure; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        for gigabytes in args.gigabytes:
            base, adapter, target = work / "base", work / "adapter", work / "out"
            make_base(base, gigabytes)
            largest = make_adapter(adapter, base)
            # Puts the base into the page cache for both, as far as memory allows.
            subprocess.run(["cat", *map(str, base.glob("*"))], stdout=subprocess.DEVNULL, check=True)
            rounds = []
            for _ in range(args.rounds):
                subprocess.run(["sync"], check=True)
                cp = copied(base, target)
                subprocess.run(["sync"], check=True)
                rounds.append((cp, *merged(base, adapter, target, "keep")))
            rounds.sort(key=lambda row: row[1] / row[0])
            cp, seconds, imports, idle, peak, *_ = rounds[len(rounds) // 2]
            print(
                f"{gigabytes:g} GB: cp -r {cp:.2f} s, merge {seconds:.2f} s = {seconds / cp:.2f}× "
                f"(with imports {seconds + imports:.2f} s = {(seconds + imports) / cp:.2f}×), "
                f"peak {peak / 1e6:.0f} MB, {idle / 1e6:.0f} MB of it the imports; "
                f"limit {600 + 3 * largest / 1e6:.0f} MB",
                flush=True,
            )
            subprocess.run(["sync"], check=True)
            seconds, _, _, peak, _, busy = merged(base, adapter, target, "fp16")
            print(
                f"  to fp16 {seconds:.2f} s = {seconds / cp:.2f}×, CPU {busy:.2f} s, peak {peak / 1e6:.0f} MB",
                flush=True,
            )
            one = work / "one_layer"
            make_adapter(one, base, only=".layers.0.")
            seconds, *_ = merged(base, one, target, "keep", "link")
            print(f"  --link, 1 of 8 shards changed: {seconds:.2f} s = {seconds / cp:.2f}×", flush=True)
            experts = work / "experts"
            make_expert_adapter(experts, base)
            rounds = []
            for _ in range(args.rounds):
                subprocess.run(["sync"], check=True)
                cp = copied(base, target)
                subprocess.run(["sync"], check=True)
                rounds.append((cp, *merged(base, experts, target, "keep", "verify")))
            rounds.sort(key=lambda row: row[1] / row[0])
            cp, seconds, _, _, peak, verify, busy = rounds[len(rounds) // 2]
            print(
                f"  LoRA on all experts: cp -r {cp:.2f} s, merge {seconds:.2f} s = {seconds / cp:.2f}×, "
                f"CPU {busy:.2f} s, peak {peak / 1e6:.0f} MB; verify {verify:.2f} s = {verify / cp:.2f}×",
                flush=True,
            )
            shutil.rmtree(experts)
            shutil.rmtree(one)
            shutil.rmtree(base)
            shutil.rmtree(adapter)
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, {resource.getpagesize()} B pages")


if __name__ == "__main__":
    main()
