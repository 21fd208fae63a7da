"""The `hynb check-data` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hynb.data.check import check_data
from hynb.data.dataset import ChatDataset
from hynb.data.pieces import LabelOptions
from hynb.data.preview import as_text
from hynb.data.report import DataReport
from hynb.data.tokenizer_folder import load_tokenizer_folder
from hynb.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hynb check-data`."""
    parser.description = (
        "Check training data line by line before a GPU is used: JSONL with one conversation per line, or a JSON "
        "array of them, plain or compressed (.gz, .zst); messages with role and content, or the "
        "forms of ShareGPT (conversations) and Alpaca (instruction, input, output)."
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="files or globs of JSONL or JSON arrays; .gz, .zst too"
    )
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
    parser.add_argument(
        "--train_on_turns",
        choices=("as_rendered", "all", "last"),
        default="as_rendered",
        help="which answers are trained on: all as the template renders them, all in full, or the last [as_rendered]",
    )
    parser.add_argument("--split_turns", action="store_true", help="one sample per answer")
    parser.add_argument(
        "--allow_ignored_fields", action="store_true", help="leave out fields that the chat template does not render"
    )
    parser.add_argument(
        "--max_cut_share",
        type=float,
        default=0.05,
        help="largest fraction of samples that may be left out because they are too long [0.05]",
    )
    parser.add_argument(
        "--tokenised",
        type=Path,
        metavar="OUT.jsonl",
        help="write source, input_ids and labels of every sample, and the answer's number under --split_turns",
    )
    parser.add_argument("--processes", type=int, help="worker processes [one per CPU, at most 64]")
    parser.add_argument("--no_cache", action="store_true", help="do not use the result of an earlier check")


def run(args: argparse.Namespace) -> int:
    """Prints the report.

    Returns:
        The exit code: 2 if no sample is left, or lines are invalid and not to be skipped; otherwise 0.

    Raises:
        DataError: files that cannot be read, or a tokenizer without a chat template.
        ModelError: the tokenizer cannot be loaded.
    """
    for name in ("max_seq_length", "per_device_train_batch_size"):
        if getattr(args, name) < 1:
            raise DataError(f"{name} = {getattr(args, name)}: must be at least 1")
    tokenizer = _load_tokenizer(args.tokenizer_name_or_path) if args.tokenizer_name_or_path else None
    options = LabelOptions(
        train_on_prompt=args.train_on_prompt,
        allow_special_tokens_in_text=args.allow_special_tokens_in_text,
        train_on_turns=args.train_on_turns,
        split_turns=args.split_turns,
        allow_ignored_fields=args.allow_ignored_fields,
    )
    if not 0 <= args.max_cut_share <= 1:
        raise DataError(f"max_cut_share = {args.max_cut_share:g}: must be from 0 to 1, a share of the samples")
    for name in ("tokenised", "rejected"):
        path = getattr(args, name)
        if path and not path.parent.is_dir():
            raise DataError(f"--{name} {path}: there is no folder {path.parent}")
    if args.tokenised and tokenizer is None:
        raise DataError("--tokenised needs a tokenizer: name its folder with --tokenizer_name_or_path")
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
    if tokenizer is None:
        print("not checked without --tokenizer_name_or_path: tokens, and what the chat template renders")
    if tokenizer and args.preview:
        _print_preview(args, tokenizer, options, report)
    if tokenizer and args.tokenised:
        written = _write_tokenised(args, tokenizer, options, report)
        print(f"{written:,} tokenised samples are in {args.tokenised}")
    if not report.samples:
        print("no sample is left to train on")
        return 2
    too_many = report.too_long_share > args.max_cut_share
    if too_many:
        print(
            f"{report.too_long_share:.1%} of the samples are left out because of max_seq_length, more than "
            f"max_cut_share = {args.max_cut_share:g}: raise one of the two"
        )
    return 2 if too_many or (report.invalid and args.on_bad_sample == "stop") else 0


def _write_tokenised(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, options: LabelOptions, report: DataReport
) -> int:
    """Writes what is trained on, sample by sample, and returns how many there are."""
    dataset = ChatDataset(args.files, tokenizer, args.max_seq_length, options=options)
    dataset = dataset.with_answers(report.line_indices.tolist(), report.answers.tolist())
    with args.tokenised.open("w", encoding="utf-8") as file:
        for index in range(len(dataset)):
            answer = {"answer": int(report.answers[index])} if options.split_turns else {}
            file.write(json.dumps({"source": dataset.location(index), **answer, **dataset[index]}) + "\n")
    return len(dataset)


def _print_preview(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, options: LabelOptions, report: DataReport
) -> None:
    dataset = ChatDataset(args.files, tokenizer, args.max_seq_length, options=options)
    dataset = dataset.with_answers(report.line_indices.tolist(), report.answers.tolist())
    for index in range(min(args.preview, len(dataset))):
        conversation = dataset.conversation(index)
        shown = as_text(conversation, tokenizer, args.max_seq_length, options=options, colour=sys.stdout.isatty())
        print(f"\n{conversation.source}:\n{shown}")


def _load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    if not Path(folder).is_dir():
        raise DataError(f"tokenizer_name_or_path = {folder}: no such folder")
    tokenizer = load_tokenizer_folder(Path(folder))
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
