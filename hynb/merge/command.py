"""The `hynb merge` command."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from hynb.merge.verify import verify_merge
from hynb.merge.write import _DTYPES, MergeProgress, merge_lora


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `hynb merge`; the first four are the guide's."""
    parser.add_argument("--base_model_path", required=True, help="folder of the base model")
    parser.add_argument(
        "--adapter_model_path", required=True, nargs="+", help="adapter folder; several are merged in a row"
    )
    parser.add_argument("--output_path", required=True, help="folder to make")
    parser.add_argument(
        "--save_dtype", default="keep", choices=["keep", *_DTYPES], help="keep: each tensor's own dtype"
    )
    parser.add_argument("--adapter_weights", nargs="+", type=float, help="a factor for each adapter")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output folder")
    parser.add_argument("--link", action="store_true", help="hard-link shards that no adapter touches")
    parser.add_argument("--verify", action="store_true", help="read the output back and compare every tensor")


def run(args: argparse.Namespace) -> int:
    """`hynb merge`: merges with a line of progress a second."""
    last = [0.0]

    def show(report: MergeProgress) -> None:
        now = time.monotonic()
        if now - last[0] > 1 or report.done_bytes == report.total_bytes:
            last[0] = now
            rate = report.done_bytes / max(report.seconds, 1e-9)
            left = f", {report.seconds_left:.0f} s left" if report.seconds_left else ""
            done, total = report.done_bytes / 1e9, report.total_bytes / 1e9
            print(f"{done:.2f} of {total:.2f} GB, {rate / 1e9:.2f} GB/s{left}", flush=True)

    names = ("base_model_path", "adapter_model_path", "output_path", "save_dtype", "adapter_weights")
    values = {name: getattr(args, name) for name in (*names, "overwrite", "link")}
    result = merge_lora(**values, progress=show)
    print(
        f"{result.output_path}: {result.tensors_changed} tensors changed, {result.tensors_copied} copied, "
        f"{result.seconds:.1f} s; largest change {result.largest_change:.3g}, mean {result.mean_change:.3g}"
    )
    if args.verify:
        print(f"verified: all {verify_merge(args.output_path)} tensors are what base and adapter make")
        from hynb.merge.forward_check import first_layers_pass

        print(first_layers_pass(Path(args.output_path)))
    return 0
