"""Memory and time of the loss over a 128k vocabulary, in chunks and with all logits: `python benchmarks/loss.py`."""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time

import torch

from hynb.hunyuan_large import loss as chunked_loss


def measure(
    kind: str, tokens: int, args: argparse.Namespace, result: multiprocessing.Queue[tuple[float, int, float, float]]
) -> None:
    """Runs forward and backward in its own process; returns seconds, peak bytes above the inputs, and the loss."""
    torch.manual_seed(0)
    head = chunked_loss.LanguageModelHead(args.hidden, args.vocabulary, bias=False)
    hidden = torch.randn(1, tokens, args.hidden, requires_grad=True)
    labels = torch.randint(0, args.vocabulary, (1, tokens))
    # Both variants need the memory of the gradients themselves.
    head.weight.grad, hidden.grad = torch.zeros_like(head.weight), torch.zeros_like(hidden)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    if kind == "chunks":
        found = chunked_loss.causal_loss(head, hidden, labels, piece=args.chunk)
    else:
        logits = head(hidden)[:, :-1].float().flatten(0, 1)
        found = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    found.backward()
    seconds = time.perf_counter() - began
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    result.put((seconds, peak, found.item(), hidden.grad.norm().item()))


def main() -> None:
    """Prints one line per length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--vocabulary", type=int, default=128_167)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=1024)
    args = parser.parse_args()
    print(f"vocabulary {args.vocabulary:,}, hidden {args.hidden}, chunks of {args.chunk} tokens, float32")
    # A forked child would start with this process's peak.
    context = multiprocessing.get_context("spawn")
    for tokens in args.lengths:
        found = {}
        for kind in ("chunks", "all logits"):
            result = context.Queue()
            child = context.Process(target=measure, args=(kind, tokens, args, result))
            child.start()
            found[kind] = result.get()
            child.join()
        (seconds, peak, loss, gradient), whole = found["chunks"], found["all logits"]
        print(
            f"{tokens} tokens: chunks {peak / 1e9:.2f} GB, {seconds:.1f} s; all logits {whole[1] / 1e9:.2f} GB, "
            f"{whole[0]:.1f} s; memory 1/{whole[1] / peak:.1f}, time {seconds / whole[0]:.2f}×; loss differs by "
            f"{abs(loss - whole[2]):.1e}, gradient norm by {abs(gradient / whole[3] - 1):.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
