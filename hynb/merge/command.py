"""The `hynb merge` command."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hynb.merge.shards import SAVE_DTYPES

if TYPE_CHECKING:
    from hynb.merge.shard_writer import MergeProgress

_REPORT_SECONDS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `hynb merge`; the first four have the names that upstream's merge script gives them."""
    parser.description = "Merge LoRA adapters into a base model, shard by shard."
    parser.add_argument("--base_model_path", required=True, help="folder of the base model")
    parser.add_argument(
        "--adapter_model_path",
        required=True,
        nargs="+",
        help="folder of the adapter; several adapters are merged one after the other",
    )
    parser.add_argument("--output_path", required=True, help="folder to write the merged model into")
    parser.add_argument(
        "--save_dtype",
        default="keep",
        choices=list(SAVE_DTYPES),
        help="dtype of the merged weights; keep leaves each tensor in its own [keep]",
    )
    parser.add_argument("--adapter_weights", nargs="+", type=float, help="a factor for each adapter [1]")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output folder")
    parser.add_argument(
        "--link", action="store_true", help="hard-link shards that no adapter touches instead of copying them"
    )
    parser.add_argument(
        "--verify", action="store_true", help="afterwards read the output back and compare every tensor"
    )


def run(args: argparse.Namespace) -> int:
    """Merges, and prints one line of progress per second."""
    # torch is imported only when a merge runs, so that `hynb merge --help` answers at once.
    from hynb.merge.forward_check import first_layers_pass
    from hynb.merge.verify import verify_merge
    from hynb.merge.write import merge_lora
    from hynb.models import serving_text

    result = merge_lora(
        base_model_path=args.base_model_path,
        adapter_model_path=args.adapter_model_path,
        output_path=args.output_path,
        save_dtype=args.save_dtype,
        adapter_weights=args.adapter_weights,
        overwrite=args.overwrite,
        link=args.link,
        progress=_print_progress(),
    )
    print(
        f"{result.output_path}: {result.tensors_changed} tensors changed, {result.tensors_copied} copied, "
        f"{result.seconds:.1f} s; largest change {result.largest_change:.3g}, mean {result.mean_change:.3g}"
    )
    if result.mtp_tensors:
        print(f"{result.mtp_tensors} of the copied tensors belong to MTP layers, which no adapter changes")
    if args.verify:
        count = verify_merge(args.output_path)
        print(f"verified: all {count} tensors are what base and adapter give")
        print(first_layers_pass(Path(args.output_path)))
    print(f"to serve it:\n{serving_text(result.output_path)}")
    return 0


def _print_progress() -> Callable[[MergeProgress], None]:
    printed_at = 0.0

    def show(report: MergeProgress) -> None:
        nonlocal printed_at
        now = time.monotonic()
        if now - printed_at < _REPORT_SECONDS and report.done_bytes < report.total_bytes:
            return
        printed_at = now
        rate = report.done_bytes / max(report.seconds, 1e-9)
        left = f", {report.seconds_left:.0f} s left" if report.seconds_left else ""
        done, total = report.done_bytes / 1e9, report.total_bytes / 1e9
        print(f"{done:.2f} of {total:.2f} GB, {rate / 1e9:.2f} GB/s{left}", flush=True)

    return show
