"""Grouped experts compared with upstream's dense dispatch and a loop over experts: `python benchmarks/moe.py`."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch
import transformers
from gpu import dense_dispatch

from hynb.hunyuan_large import HunYuanLargeConfig, HunYuanLargeForCausalLM, HunYuanLargeMoE

# All experts of the small size fit into a CPU's cache, which hides the cost of the loop; those of the large size do
# not, like those of any real model.
SIZES = {"small": {"hidden_size": 256, "intermediate_size": 512}, "large": {"hidden_size": 1024}}
COMMON = {
    "vocab_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_experts": 16,
    "moe_topk": 1,
    "use_cla": True,
    "cla_share_factor": 2,
    "use_mixed_mlp_moe": True,
    "use_qk_norm": True,
    "max_position_embeddings": 4096,
}


def step(module: torch.nn.Module, run: Callable[[], torch.Tensor], on_gpu: bool) -> tuple[float, int, float]:
    """Seconds of a forward and backward pass, bytes saved for the backward pass, and the loss."""
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    module.zero_grad()
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    loss.backward()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    return seconds, sum(size for place, size in seen.items() if place not in weights), loss.item()


def compare(
    name: str,
    module: torch.nn.Module,
    run_of: Callable[[int], Callable[[], torch.Tensor]],
    lengths: list[int],
    args: argparse.Namespace,
) -> None:
    """Prints one line per length.

    Args:
        run_of: returns, for a length in tokens, the function that computes a loss.
    """
    config = module.config if hasattr(module, "config") else module.experts.config
    sparse = HunYuanLargeMoE.forward
    for length in lengths:
        run = run_of(length)
        found = {}
        for kind in ("grouped_mm", "eager", "dense"):
            if kind == "dense" and length > args.dense_up_to:
                continue
            HunYuanLargeMoE.forward = dense_dispatch if kind == "dense" else sparse
            config._experts_implementation = "eager" if kind == "dense" else kind
            rounds = 2 if kind == "dense" else args.rounds
            found[kind] = min(step(module, run, args.device != "cpu") for _ in range(rounds))
        HunYuanLargeMoE.forward = sparse
        seconds, saved, loss = found["grouped_mm"]
        line = f"{name}, {length} tokens: grouped_mm {seconds:.4f} s, {saved / length / 1e3:.1f} kB saved per token"
        for kind in ("eager", "dense"):
            if kind in found:
                other = found[kind]
                assert abs(other[2] - loss) < 2e-2 * max(1, abs(loss)), "the three variants differ"
                line += f"; {kind} {other[0] / seconds:.1f}×, {other[1] / length / 1e3:.0f} kB"
        print(line, flush=True)


def model_of(size: str, args: argparse.Namespace) -> HunYuanLargeForCausalLM:
    """A whole model with 4 layers."""
    config = HunYuanLargeConfig(**COMMON | SIZES[size])
    model = HunYuanLargeForCausalLM._from_config(config, dtype=torch.float32).train()
    return model.to(args.device, getattr(torch, args.dtype))


def main() -> None:
    """Measures the experts alone (router included) and the whole model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument(
        "--dense_up_to",
        type=int,
        default=2048,
        help="the dense dispatch takes memory proportional to the square of the length",
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if args.device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{device} ({platform.machine()}), {args.dtype}, {versions}")
    for size in SIZES:
        model = model_of(size, args)
        block = model.model.layers[0].mlp
        shared, block.shared_mlp = block.shared_mlp, None

        def experts(length: int, block: HunYuanLargeMoE = block) -> Callable[[], torch.Tensor]:
            width = block.gate.wg.in_features
            hidden = torch.randn(1, length, width, device=args.device, dtype=getattr(torch, args.dtype))
            hidden.requires_grad_()
            return lambda: block(hidden).float().square().mean()

        compare(f"{size}, experts alone", block, experts, args.lengths, args)
        block.shared_mlp = shared

        def whole(length: int, model: HunYuanLargeForCausalLM = model) -> Callable[[], torch.Tensor]:
            ids = torch.randint(0, COMMON["vocab_size"], (1, length), device=args.device)
            return lambda: model(input_ids=ids, labels=ids).loss

        compare(f"{size}, whole model", model, whole, args.lengths, args)


if __name__ == "__main__":
    main()
