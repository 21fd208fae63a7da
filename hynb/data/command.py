"""The `hynb check-data` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hynb.data.check import check_data
from hynb.data.dataset import ChatDataset
from hynb.data.preview import as_text
from hynb.data.template import LabelOptions
from hynb.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hynb check-data`."""
    parser.description = "Check training data line by line before a GPU is used."
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSONL files or globs; .gz and .zst too")
    parser.add_argument("--tokenizer_name_or_path", help="folder; without it only the format is checked")
    parser.add_argument(
        "--max_seq_length", type=int, default=2048, help="tokens at which samples are truncated [2048]"
    )
    parser.add_argument("--per_device_train_batch_size", type=int, default=1, help="for the fraction of padding [1]")
    parser.add_argument(
        "--on_bad_sample", choices=("stop", "skip"), default="stop", help="whether invalid lines are an error [stop]"
    )
    parser.add_argument("--rejected", type=Path, metavar="FILE", help="write the invalid lines to this file")
    parser.add_argument("--train_on_prompt", action="store_true", help="train on prompts too")
    parser.add_argument(
        "--allow_special_tokens_in_text", action="store_true", help="text such as <|eos|> becomes that token"
    )
    parser.add_argument(
        "--preview", type=int, default=0, metavar="N", help="show N samples with trained tokens marked"
    )
    parser.add_argument("--processes", type=int, help="worker processes [one per CPU, at most 8]")
    parser.add_argument("--no_cache", action="store_true", help="do not use the result of an earlier check")


def run(args: argparse.Namespace) -> int:
    """Prints the report.

    Returns:
        The exit code: 2 if no sample is left, or lines are invalid and not to be skipped; otherwise 0.

    Raises:
        DataError: files that cannot be read, or a tokenizer that cannot be loaded.
    """
    for name in ("max_seq_length", "per_device_train_batch_size"):
        if getattr(args, name) < 1:
            raise DataError(f"{name} = {getattr(args, name)}: must be at least 1")
    tokenizer = _load_tokenizer(args.tokenizer_name_or_path) if args.tokenizer_name_or_path else None
    options = LabelOptions(
        train_on_prompt=args.train_on_prompt, allow_special_tokens_in_text=args.allow_special_tokens_in_text
    )
    report = check_data(
        args.files,
        tokenizer,
        args.max_seq_length if tokenizer else None,
        options=options,
        on_bad_sample="report",
        rejected_path=args.rejected,
        processes=args.processes,
        progress=_progress_bar() if sys.stderr.isatty() else None,
        cache=not args.no_cache,
    )
    allowed = args.allow_special_tokens_in_text
    print(report.text(batch_size=args.per_device_train_batch_size, special_tokens_allowed=allowed))
    if tokenizer and args.preview:
        _print_preview(args, tokenizer, options, report.line_indices[: args.preview].tolist())
    if not report.samples:
        print("no sample is left to train on")
        return 2
    return 2 if report.rejected and args.on_bad_sample == "stop" else 0


def _print_preview(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, options: LabelOptions, line_indices: Sequence[int]
) -> None:
    dataset = ChatDataset(args.files, tokenizer, args.max_seq_length, options=options)
    for index in line_indices:
        conversation = dataset.conversation(index)
        shown = as_text(conversation, tokenizer, args.max_seq_length, options=options, colour=sys.stdout.isatty())
        print(f"\n{conversation.source}:\n{shown}")


def _load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    import hynb.hunyuan_large  # noqa: F401  registers its tokenizer

    if not Path(folder).is_dir():
        raise DataError(f"tokenizer_name_or_path = {folder}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"tokenizer_name_or_path = {folder}: cannot be loaded: {error}") from error
    if not tokenizer.chat_template:
        raise DataError(
            f"tokenizer_name_or_path = {folder}: has no chat template; use the tokenizer of an instruct model"
        )
    return tokenizer


def _progress_bar() -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        bar = "█" * round(30 * done / total)
        print(f"\r{bar:<30} {done / 1e6:,.0f} of {total / 1e6:,.0f} MB", end=end, file=sys.stderr, flush=True)

    return show
