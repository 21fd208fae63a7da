"""The data sets of a run: checked once on rank 0, then the same on every rank; split, packed or grouped."""

from __future__ import annotations

import logging
import math
import os
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
    cache_folder,
    check_data,
    kept_tokens,
    split_share,
)
from hynb.errors import DataError
from hynb.runs import RunDir
from hynb.train.process import ranks_of_host

logger = logging.getLogger(__name__)

# Longer than any sample: the max_seq_length of a check that truncates nothing.
_NO_LIMIT_TOKENS = 1 << 40
_PROGRESS_SECONDS = 10.0
_SHOWN_SECONDS = 1.0
# One core tokenises about a million tokens per second, several times what a GPU trains on.
_TOKENISING_WORKERS = 2


@dataclass(kw_only=True)
class CheckedFiles:
    """What the other ranks need of rank 0's check of the files of one parameter.

    Args:
        rejected: locations (file:line) of the lines that are left out.
        lengths: tokens of each remaining sample, after truncation.
        lines, answers: of each sample, the index of its line among those that are not left out, and the number of the
            answer that ends it; None where each line is one sample.
        tokens: name of the file in the cache that has the samples' token ids, on hosts where it is; None: nowhere.
    """

    rejected: list[str]
    lengths: np.ndarray
    lines: np.ndarray | None = None
    answers: np.ndarray | None = None
    tokens: str | None = None

    @property
    def line_count(self) -> int:
        """The number of lines that are not left out."""
        return len(self.lengths) if self.lines is None else int(self.lines.max()) + 1


@dataclass(kw_only=True)
class DataPlan:
    """What is trained on and evaluated on; made on rank 0 and sent to the other ranks.

    Args:
        summary: counts for the manifest.
    """

    train: CheckedFiles
    evaluation: CheckedFiles | None
    summary: dict[str, int]


@dataclass(kw_only=True)
class Datasets:
    """The data sets of one rank.

    Args:
        train: samples, or packs of samples.
        evaluation: None where nothing is evaluated.
        lengths: tokens of each sample of `train`, for grouping by length; None where samples are not grouped.
    """

    train: ChatDataset | PackedDataset
    evaluation: ChatDataset | None
    lengths: np.ndarray | None


def label_options(config: Config) -> LabelOptions:
    """The options of a Config that decide which tokens have labels."""
    return LabelOptions(
        train_on_prompt=config.train_on_prompt,
        allow_special_tokens_in_text=config.allow_special_tokens_in_text,
        train_on_turns=config.train_on_turns,
        split_turns=config.split_turns,
        allow_ignored_fields=config.allow_ignored_fields,
    )


def check_datasets(
    config: Config, tokenizer: PreTrainedTokenizerBase, show_progress: Callable[[str], None] | None = None
) -> DataPlan:
    """Checks every line before a GPU is used; writes rejected.jsonl if lines are left out.

    Args:
        show_progress: takes a text on how much has been checked, at most once per second; None where nobody looks.

    Raises:
        DataError: invalid lines under `on_bad_sample: stop`, or no sample is left.
    """
    run_dir = RunDir(config.output_dir)
    train = _check(config, tokenizer, "train_data_file", run_dir.rejected, show_progress)
    evaluation = None
    if config.eval_data_file is not None:
        evaluation = _check(config, tokenizer, "eval_data_file", run_dir.rejected_evaluation, show_progress)
    if config.eval_split:
        # Raises here, before the ranks meet, if there are too few samples.
        _split(_checked(train), config)
    summary = {
        "data_lines": train.lines,
        "data_samples": train.samples,
        "data_rejected": len(train.rejected),
        "data_tokens": int(train.kept.sum()),
        "data_supervised_tokens": int(train.trained_kept.sum()),
    }
    return DataPlan(train=_checked(train), evaluation=_checked(evaluation) if evaluation else None, summary=summary)


def broadcast_plan(plan: DataPlan | None) -> DataPlan:
    """Rank 0's plan on every rank; the process group must exist."""
    plans = [plan]
    if torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(plans, src=0)
    assert plans[0] is not None
    return plans[0]


def build_datasets(config: Config, tokenizer: PreTrainedTokenizerBase, plan: DataPlan) -> Datasets:
    """The data sets of a plan.

    Raises:
        DataError: this host's files are not those that rank 0 has checked.
    """
    lengths = plan.train.lengths
    train_indices = evaluation = None
    if config.eval_split:
        train_indices, held_out = _split(plan.train, config)
        evaluation = _dataset(config, tokenizer, "train_data_file", plan.train, indices=held_out)
        lengths = lengths[train_indices]
    elif plan.evaluation is not None:
        evaluation = _dataset(config, tokenizer, "eval_data_file", plan.evaluation)
    limit = _NO_LIMIT_TOKENS if config.split_long_samples else config.max_seq_length
    train: ChatDataset | PackedDataset = _dataset(
        config, tokenizer, "train_data_file", plan.train, indices=train_indices, max_tokens=limit
    )
    if config.packing:
        parts = _split_parts(lengths, config.max_seq_length)
        packs = best_fit(parts[:, 2] - parts[:, 1], config.max_seq_length, seed=config.seed)
        train = PackedDataset(train, packs, parts)
    return Datasets(train=train, evaluation=evaluation, lengths=lengths if config.group_by_length else None)


def training_sampler(config: Config, datasets: Datasets, world_size: int) -> SeededSampler:
    """The sampling order of the training set, which depends on seed and epoch only."""
    replicas = world_size // config.sequence_parallel_size
    group = config.per_device_train_batch_size * config.gradient_accumulation_steps * replicas
    # An array serves as the sequence that the annotation names; a list of 100 million samples would take gigabytes.
    lengths: Any = datasets.lengths
    return SeededSampler(len(datasets.train), config.seed, lengths=lengths, group=group)


def data_workers(config: Config, datasets: Datasets) -> tuple[int, str]:
    """How many processes of this rank read batches ahead, with the reason."""
    if config.dataloader_num_workers is not None:
        return config.dataloader_num_workers, "as given"
    if not torch.cuda.is_available():
        return 0, "without a GPU, training uses all cores itself"
    samples = datasets.train.dataset if isinstance(datasets.train, PackedDataset) else datasets.train
    has_tokens = isinstance(samples, ChatDataset) and samples.has_tokens
    ranks = ranks_of_host()
    cores = len(os.sched_getaffinity(0))
    # One core of each rank feeds its GPU.
    workers = max(0, min(1 if has_tokens else _TOKENISING_WORKERS, cores // ranks - 1))
    if not workers:
        return 0, f"{cores} CPU cores for {ranks} ranks leave none for them"
    return workers, "token ids are kept and only read" if has_tokens else "samples are tokenised as they are read"


def check_files(
    config: Config, tokenizer: PreTrainedTokenizerBase, parameter: str, *, truncate: bool = True, **options: Any
) -> DataReport:
    """Checks the files of one parameter as a run of this Config would read them.

    Args:
        parameter: train_data_file or eval_data_file.
        truncate: whether samples are cut at max_seq_length.
        options: further arguments of `check_data`.
    """
    limit = config.max_seq_length if truncate else _NO_LIMIT_TOKENS
    given = {"options": label_options(config), "on_bad_sample": config.on_bad_sample, "parameter": parameter}
    given["max_cut_share"] = config.max_cut_share
    return check_data(getattr(config, parameter), tokenizer, limit, **(given | options))


def _dataset(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    parameter: str,
    checked: CheckedFiles,
    *,
    indices: Sequence[int] | None = None,
    max_tokens: int | None = None,
) -> ChatDataset:
    """The samples of one parameter's files, or those at the given indices.

    Args:
        max_tokens: longest sample, in tokens; None for max_seq_length.
    """
    paths = getattr(config, parameter)
    dataset = ChatDataset(
        paths,
        tokenizer,
        max_tokens or config.max_seq_length,
        options=label_options(config),
        rejected=checked.rejected,
        parameter=parameter,
        checked=True,
    )
    if len(dataset) != checked.line_count:
        raise DataError(
            f"{parameter} = {paths}: has {len(dataset)} samples on this host and {checked.line_count} on rank 0's: "
            "copy the same file to every host"
        )
    if checked.lines is not None and checked.answers is not None:
        dataset = dataset.with_answers(checked.lines, checked.answers)
    # A host without the file tokenises on access, with the same result.
    store = kept_tokens(checked.tokens) if checked.tokens else None
    if store is not None and np.array_equal(store.lengths, checked.lengths):
        dataset = dataset.with_tokens(store)
    return dataset.subset(indices) if indices is not None else dataset


def _split_parts(lengths: np.ndarray, max_seq_length: int) -> np.ndarray:
    """Index of the sample, first token and end of each part of at most max_seq_length tokens; shape (parts, 3)."""
    sizes = lengths.astype(np.int64)
    counts = -(-sizes // max_seq_length)
    samples = np.repeat(np.arange(len(sizes)), counts)
    starts = (np.arange(len(samples)) - np.repeat(np.cumsum(counts) - counts, counts)) * max_seq_length
    return np.stack([samples, starts, np.minimum(starts + max_seq_length, sizes[samples])], axis=1)


def _check(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    parameter: str,
    rejected_path: Path,
    show: Callable[[str], None] | None,
) -> DataReport:
    truncate = not (config.split_long_samples and parameter == "train_data_file")
    # A run that this one resumes may have left it; the data may have been fixed since.
    rejected_path.unlink(missing_ok=True)
    options = {"rejected_path": rejected_path, "progress": _progress(parameter, show)}
    report = check_files(config, tokenizer, parameter, truncate=truncate, **options)
    logger.info(f"{report.samples} samples, {len(report.rejected)} rejected, in {', '.join(report.files)}")
    if report.tokens:
        size_mb = report.tokens.stat().st_size / 1e6
        logger.info(f"token ids are kept in {report.tokens} ({size_mb:.1f} MB) and not computed again")
    elif report.tokens_note:
        logger.info(
            f"token ids are not kept in {cache_folder()}: {report.tokens_note}; samples are tokenised during "
            "training. XDG_CACHE_HOME names another folder"
        )
    if report.rejected:
        logger.info(f"{len(report.rejected)} lines or samples are left out; they are kept in {rejected_path}")
    if report.too_long:
        logger.info(f"left out: {report.too_long_text()}")
    for name, count in report.unknown_keys.items():
        logger.info(f"the key {name} of {count} samples is not used: neither hynb nor the chat template reads it")
    for name, count in report.ignored_fields.items():
        logger.info(f"the field {name} of {count} samples is not rendered by the chat template")
    for text in report.note_texts():
        logger.info(text)
    if report.written_time:
        logger.info(report.time_text())
    if shortened := int(report.shortened.sum()):
        logger.info(
            f"{shortened} earlier answers are rendered without a part, such as their thought; split_turns: true "
            "trains each answer in full"
        )
    if report.cut_samples:
        logger.info(
            f"{report.cut_samples} samples are longer than max_seq_length = {config.max_seq_length} and are cut, "
            f"which removes {report.cut_answer_tokens} answer tokens"
        )
    if report.duplicate_count:
        logger.info(f"{report.duplicate_count} samples repeat an earlier one; `hynb check-data` lists them")
    return report


def _progress(parameter: str, show: Callable[[str], None] | None) -> Callable[[int, int], None]:
    """Takes the bytes done and in all, shows them at most once per second and logs them now and then."""
    logged, shown = time.monotonic(), -math.inf

    def note(done_bytes: int, total_bytes: int) -> None:
        nonlocal logged, shown
        now = time.monotonic()
        text = f"{parameter}: {done_bytes / 1e6:.0f} of {total_bytes / 1e6:.0f} MB"
        if show is not None and now - shown >= _SHOWN_SECONDS:
            shown = now
            show(text)
        if now - logged >= _PROGRESS_SECONDS:
            logged = now
            logger.info(f"checking {text}")

    return note


def _checked(report: DataReport) -> CheckedFiles:
    lines = answers = None
    if report.answers.any():
        is_next_line = np.diff(report.line_indices, prepend=report.line_indices[:1]) != 0
        lines, answers = np.cumsum(is_next_line, dtype=np.uint32), np.array(report.answers, dtype=np.uint16)
    return CheckedFiles(
        rejected=report.rejected_locations,
        # A copy in memory: what is mapped from a file cannot be sent.
        lengths=np.array(report.kept, dtype=np.uint32),
        lines=lines,
        answers=answers,
        tokens=report.tokens.name if report.tokens else None,
    )


def _split(checked: CheckedFiles, config: Config) -> tuple[list[int], list[int]]:
    """Indices of samples to train on and to evaluate on; samples of one conversation stay together.

    Raises:
        DataError: too few samples.
    """
    train, held_out = split_share(checked.line_count, config.eval_split, config.seed)
    if checked.lines is None:
        return train, held_out
    in_evaluation = np.isin(checked.lines, held_out)
    return np.flatnonzero(~in_evaluation).tolist(), np.flatnonzero(in_evaluation).tolist()
