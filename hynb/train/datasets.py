"""The data sets of a run: checked once on rank 0, then the same on every rank; split, packed or grouped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hynb.config import Config
from hynb.data import (
    ChatDataset,
    DataReport,
    LabelOptions,
    PackedDataset,
    SeededSampler,
    best_fit,
    check_data,
    split_share,
)
from hynb.errors import DataError
from hynb.runs import RunDir

# Longer than any sample: what a check takes for max_seq_length where nothing is cut.
_UNCUT_TOKENS = 1 << 40
_PROGRESS_SECONDS = 10.0
Say = Callable[[str], None]


@dataclass(kw_only=True)
class Checked:
    """What rank 0 found in one set of files, as every rank needs it.

    rejected: file:line of the lines left out.
    lengths: tokens of each sample that is left, after the cut.
    """

    rejected: list[str]
    lengths: np.ndarray


@dataclass(kw_only=True)
class Plan:
    """What is trained on and evaluated on; made on rank 0, sent to the others."""

    train: Checked
    evaluation: Checked | None
    summary: dict[str, int]


def label_options(config: Config) -> LabelOptions:
    """What a Config says about labels."""
    return LabelOptions(
        train_on_prompt=config.train_on_prompt,
        allow_special_tokens_in_text=config.allow_special_tokens_in_text,
    )


def check(config: Config, tokenizer: PreTrainedTokenizerBase, say: Say) -> Plan:
    """Looks at every line before a GPU is touched; writes rejected.jsonl when lines are left out.

    Args:
        say: takes each line that the user should read, progress of a long check included.

    Raises:
        DataError: broken lines under `on_bad_sample = stop`, or nothing is left.
    """
    run_dir = RunDir(config.output_dir)
    train = _check(config, tokenizer, "train_data_file", run_dir.rejected, say)
    evaluation = None
    if config.eval_data_file is not None:
        evaluation = _check(config, tokenizer, "eval_data_file", run_dir.rejected_evaluation, say)
    if config.eval_split:
        # Too few samples are said here, before the ranks meet.
        split_share(train.samples, config.eval_split, config.seed)
    summary = {
        "data_lines": train.lines,
        "data_samples": train.samples,
        "data_rejected": len(train.rejected),
        "data_tokens": int(train.kept.sum()),
        "data_supervised_tokens": int(train.trained_kept.sum()),
    }
    return Plan(train=_checked(train), evaluation=_checked(evaluation) if evaluation else None, summary=summary)


def share(plan: Plan | None) -> Plan:
    """Rank 0's plan on every rank; torch.distributed must have begun."""
    sent = [plan]
    if torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(sent, src=0)
    assert sent[0] is not None
    return sent[0]


def build(
    config: Config, tokenizer: PreTrainedTokenizerBase, plan: Plan
) -> tuple[Any, ChatDataset | None, np.ndarray | None]:
    """Training set, evaluation set, and the lengths by which samples are grouped, where they are.

    Raises:
        DataError: this host's files are not those that rank 0 has checked.
    """
    options = label_options(config)

    def data_set(parameter: str, checked: Checked, indices: Sequence[int] | None, max_tokens: int) -> ChatDataset:
        paths = getattr(config, parameter)
        made = ChatDataset(
            paths, tokenizer, max_tokens, options=options, rejected=checked.rejected, parameter=parameter
        )
        if len(made) != len(checked.lengths):
            raise DataError(
                f"{parameter} = {paths}: has {len(made)} samples on this host, {len(checked.lengths)} on the "
                "first one: copy the same file to every host"
            )
        return made.subset(indices) if indices is not None else made

    lengths = plan.train.lengths
    train_indices = evaluation = None
    if config.eval_split:
        train_indices, held_out = split_share(len(lengths), config.eval_split, config.seed)
        evaluation = data_set("train_data_file", plan.train, held_out, config.max_seq_length)
        lengths = lengths[train_indices]
    elif plan.evaluation is not None:
        evaluation = data_set("eval_data_file", plan.evaluation, None, config.max_seq_length)
    max_tokens = _UNCUT_TOKENS if config.split_long_samples else config.max_seq_length
    train: Any = data_set("train_data_file", plan.train, train_indices, max_tokens)
    if config.packing:
        parts = split_parts(lengths, config.max_seq_length)
        packs = best_fit([stop - start for _, start, stop in parts], config.max_seq_length, seed=config.seed)
        train = PackedDataset(train, packs, parts)
    return train, evaluation, lengths if config.group_by_length else None


def split_parts(lengths: Sequence[int], max_seq_length: int) -> list[tuple[int, int, int]]:
    """Sample, first token and end of each part of at most max_seq_length tokens."""
    return [
        (index, start, min(start + max_seq_length, length))
        for index, length in enumerate(np.asarray(lengths).tolist())
        for start in range(0, length, max_seq_length)
    ]


def sampler(config: Config, count: int, lengths: np.ndarray | None, world_size: int) -> SeededSampler:
    """The order of the training set, which seed and epoch alone decide."""
    group = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size
    return SeededSampler(count, config.seed, lengths=lengths, group=group)


def check_files(
    config: Config, tokenizer: PreTrainedTokenizerBase, parameter: str, *, uncut: bool = False, **options: Any
) -> DataReport:
    """Checks the files of one parameter as a run of this Config would read them.

    Args:
        parameter: train_data_file or eval_data_file.
        uncut: count whole samples instead of cutting them at max_seq_length.
        options: further arguments of `check_data`.
    """
    limit = _UNCUT_TOKENS if uncut else config.max_seq_length
    given = {"options": label_options(config), "on_bad_sample": config.on_bad_sample, "parameter": parameter}
    return check_data(getattr(config, parameter), tokenizer, limit, **(given | options))


def _check(
    config: Config, tokenizer: PreTrainedTokenizerBase, parameter: str, rejected_path: Path, say: Say
) -> DataReport:
    uncut = config.split_long_samples and parameter == "train_data_file"
    # Of a run that this one resumes: the data may have been mended since.
    rejected_path.unlink(missing_ok=True)
    kept = {"rejected_path": rejected_path, "progress": _progress(parameter, say)}
    report = check_files(config, tokenizer, parameter, uncut=uncut, **kept)
    say(f"{report.samples} samples, {len(report.rejected)} rejected, in {', '.join(report.files)}")
    if report.rejected:
        say(f"{len(report.rejected)} of {report.lines} lines are left out; they are kept in {rejected_path}")
    if report.cut_samples:
        say(
            f"{report.cut_samples} samples are longer than max_seq_length = {config.max_seq_length} and are cut, "
            f"which costs {report.cut_answer_tokens} answer tokens"
        )
    if report.duplicate_count:
        say(f"{report.duplicate_count} samples are the same as an earlier one; `hynb check-data` names them")
    return report


def _progress(parameter: str, say: Say) -> Callable[[int, int], None]:
    said = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _PROGRESS_SECONDS:
            said = time.monotonic()
            say(f"checking {parameter}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")

    return show


def _checked(report: DataReport) -> Checked:
    return Checked(rejected=report.rejected_places, lengths=report.kept.astype(np.uint32))
