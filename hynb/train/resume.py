"""The checkpoint that all ranks resume from: whole on every host, chosen before anything is loaded."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from hynb.config import Config
from hynb.data import data_hash
from hynb.errors import ConfigError, RunError
from hynb.runs import (
    CHECKPOINT_RECORD,
    RunDir,
    check_checkpoint,
    check_files,
    checkpoint_files,
    compare,
    ended_well,
    is_resharded,
    made_with,
    nothing_left,
    read_record,
    resume_candidates,
    set_aside,
)
from hynb.train.gathering import of_all_ranks
from hynb.train.process import decided_by_rank_0
from hynb.train.timeouts import uneven_work

if TYPE_CHECKING:
    from transformers import TrainerState

    from hynb.train.trainer import RunTrainer

logger = logging.getLogger(__name__)


def choose_checkpoint(config: Config, ranks: Sequence[int]) -> tuple[Path, list[str]]:
    """The checkpoint to resume from, and why each newer one is passed over; every rank calls it.

    Sizes and headers are always checked. After a run that did not end by itself all digests are, each rank reading a
    share of the files.

    Args:
        ranks: those that see the same run folder as this one.

    Raises:
        RunError: the checkpoint that was named, or every one of "last", is damaged or missing.
    """
    with uneven_work():
        folder, skipped = _first_whole(config, ranks)
    for text in skipped:
        logger.warning(f"{text}; passed over")
    logger.info(f"resuming from {folder}")
    return folder, skipped


def _first_whole(config: Config, ranks: Sequence[int]) -> tuple[Path, list[str]]:
    names = [str(path) for path in resume_candidates(config)]
    # A named checkpoint that is trusted may have been changed on purpose.
    trusted = config.trust_checkpoint and config.resume_from_checkpoint != "last"
    reads_all = bool(names) and not trusted and not ended_well(RunDir(Path(names[0]).parent))
    names, reads_all = _of_rank_0((names, reads_all))
    skipped: list[str] = []
    for name in names:
        folder = Path(name)
        # The first rank of each host looks at what its host sees.
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        problems = _of_all(check_checkpoint(folder, trusted=config.trust_checkpoint) if is_first else [])
        if not problems and reads_all:
            share = sorted(checkpoint_files(folder))[ranks.index(dist.get_rank()) :: len(ranks)]
            problems = _of_all(check_files(folder, deep=True, names=share))
        if not problems:
            return folder, skipped
        skipped += problems
    raise RunError(skipped or [f"resume_from_checkpoint = last: there is no checkpoint in {config.output_dir}"])


def run_shape(config: Config, ds_config: dict[str, Any], world_size: int) -> dict[str, Any]:
    """What a resumed run must have in common with the run that saved its checkpoint, and the global batch size.

    Args:
        ds_config: DeepSpeed's settings as they are used.
    """
    size = config.sequence_parallel_size
    micro_batches = config.gradient_accumulation_steps * world_size // size
    return {
        "world_size": world_size,
        "zero_stage": ds_config.get("zero_optimization", {}).get("stage", 0),
        "use_lora": config.use_lora,
        "sequence_parallel_size": size,
        "global_batch_size": config.per_device_train_batch_size * micro_batches,
    }


def going_on_from(config: Config, resume: Path, world_size: int) -> Config:
    """A Config that resumes from one checkpoint and, on another number of ranks, keeps its global batch.

    The global batch is kept by accumulating over more or fewer batches.

    Raises:
        ConfigError: no number of accumulation steps does, with the batch sizes that work.
    """
    config = config.replace(resume_from_checkpoint=str(resume))
    record = read_record(resume / CHECKPOINT_RECORD) or {}
    saved, before = record.get("global_batch_size"), record.get("made_with") or {}
    replicas = world_size // config.sequence_parallel_size
    size, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    changed = before.get("gradient_accumulation_steps") != steps
    if record.get("world_size") == world_size or saved in (None, size * steps * replicas) or changed:
        return config
    if saved % (size * replicas):
        sizes = [count for count in range(1, saved + 1) if saved % (count * replicas) == 0]
        works = (
            f"per_device_train_batch_size = {' or '.join(map(str, sizes))}" if sizes else "Another number of ranks"
        )
        raise ConfigError(
            f"per_device_train_batch_size = {size}: {world_size} ranks cannot make the global batch of {saved} "
            f"samples that {resume} was saved with, on {record['world_size']} ranks. {works} can"
        )
    steps = saved // (size * replicas)
    logger.info(
        f"resume: gradient_accumulation_steps = {steps} instead of {config.gradient_accumulation_steps} keeps the "
        f"global batch of {saved} samples on {world_size} ranks instead of {record['world_size']}"
    )
    return config.replace(gradient_accumulation_steps=steps)


def compare_with_checkpoint(
    config: Config, resume: Path | None, shape: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """What this run's checkpoints record, and what it changes that a checkpoint would restore; every rank calls it.

    Args:
        resume: the checkpoint that the run goes on from; None when it begins.
        shape: of this run, as from `run_shape`.

    Raises:
        ConfigError: every difference that is not allowed.
    """
    assert config.train_data_file is not None
    path = config.train_data_file
    with uneven_work():
        now = made_with(config, decided_by_rank_0(lambda _: data_hash(path)))
    if resume is None:
        return now, []
    samples = shape["global_batch_size"]
    record = read_record(resume / CHECKPOINT_RECORD) or {}
    saved = record.get("global_batch_size", samples)
    compared = dict(now)
    if is_resharded(resume, shape):
        logger.info(
            f"resume: {shape['world_size']} ranks and ZeRO stage {shape['zero_stage']}, in the run that saved "
            f"{resume.name} {record['world_size']} and {record['zero_stage']}: the states are distributed anew"
        )
        if saved == samples:
            del compared["gradient_accumulation_steps"]
    notes, refused, changed = compare(resume, compared, config.allow_changed, samples=(saved, samples))
    if refused:
        raise ConfigError(refused)
    for note in notes:
        logger.info(f"resume: {note}")
    return now, changed


def begin_resumed(
    config: Config, resume: Path, trainer: RunTrainer, state: TrainerState, *, moves: bool
) -> list[str]:
    """Refuses to train nothing, and leaves the branch behind that the checkpoint was part of.

    Args:
        state: as it was loaded.
        moves: whether this rank moves the checkpoints of that branch.

    Returns:
        Their new paths.

    Raises:
        ConfigError: the checkpoint is of the last step or beyond.
    """
    # transformers goes on with the checkpoint's logging_steps, eval_steps and save_steps.
    state.compute_steps(trainer.args, state.max_steps)
    if state.global_step >= state.max_steps:
        given = "max_steps" if config.max_steps else "num_train_epochs"
        end = f"{given} = {getattr(config, given):g} ({state.max_steps} steps)"
        raise ConfigError(nothing_left(resume, state.global_step, end))
    moved = [str(path) for path in set_aside(RunDir(config.output_dir), resume)] if moves else []
    if moved:
        logger.warning(
            f"{len(moved)} checkpoints beyond {resume.name} belong to the branch that this run leaves and were moved "
            f"to {Path(moved[0]).parent}: remove them if they are not needed, or resume from one"
        )
    return moved


def _of_rank_0(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _of_all(problems: list[str]) -> list[str]:
    """The problems that all ranks have found, with the host where not every one has the same."""
    found: list[tuple[str, list[str]]] = of_all_ranks((socket.gethostname(), problems))
    hosts = {host for host, _ in found}
    texts = {f"{host}: {text}" if len(hosts) > 1 else text: None for host, some in found for text in some}
    return list(texts)
