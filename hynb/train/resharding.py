"""Resuming with another number of ranks or another ZeRO stage than those that saved the checkpoint.

Each rank maps the files of all the ranks that saved, and copies what its own partitions hold of them: nothing is
converted on the disk, and no rank ever holds more than its share. DeepSpeed's universal checkpoint does the same by
way of one file per parameter and state, written by `deepspeed/checkpoint/ds_to_universal.py`; in DeepSpeed 0.19.8 it
gives all parameters the weight decay of the first group under ZeRO-3 (stage3.py,
`load_hp_checkpoint_state_from_checkpoint_dir_stage3`).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hynb.errors import RunError
from hynb.runs import CHECKPOINT_RECORD, RunWriter, is_resharded, read_record
from hynb.train.byte_progress import ByteProgress
from hynb.train.library_loading import replaced
from hynb.train.saved_states import load_states, restricted_unpickling

logger = logging.getLogger(__name__)

# The states of a parameter: its float32 weight, and what Adam keeps of it.
_WEIGHT, _MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Piece:
    """A part of a parameter that one rank has saved.

    Args:
        start: of the part, in elements of the flattened parameter.
        count: its elements.
        states: flat tensors of the group that the part lies in.
        offset: of the part in each of them, in elements.
    """

    start: int
    count: int
    states: Mapping[str, torch.Tensor]
    offset: int


class SavedStates:
    """The weights and optimizer states of a checkpoint, whatever its number of ranks and its ZeRO stage (1 to 3).

    Args:
        folder: of the checkpoint.
        trusted: whatever is in it may be unpickled.

    Attributes:
        model: what the first rank saved beside the states: steps, schedule, buffers.
        param_groups: of the optimizer, with their hyperparameters.
        scaler: the state of the loss scale.
        steps: optimizer steps that the moments have seen; None before the first.

    Raises:
        RunError: files are missing, which are on other hosts where each host has its own disk; or their content is
            not what DeepSpeed saves.
    """

    def __init__(self, folder: Path, *, trusted: bool) -> None:
        self._pieces: dict[str, list[_Piece]] = defaultdict(list)
        self.steps: torch.Tensor | float | None = None
        self._folder = folder
        optimizers = _states_of_ranks(folder)
        models = sorted(folder.glob("global_step*/*_model_states.pt"), key=_rank_of)
        if not optimizers or not models:
            raise RunError(f"{folder}: has no optimizer states of DeepSpeed, so it cannot be resumed")
        self.model: dict[str, Any] = load_states(models[0], trusted=trusted, mmap=True)
        for rank, path in enumerate(optimizers):
            states = load_states(path, trusted=trusted, mmap=True)["optimizer_state_dict"]
            try:
                self._take(states, rank, len(optimizers))
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise RunError(f"{path}: is not an optimizer state of ZeRO 1 to 3 with Adam ({error!r})") from error

    def _take(self, states: dict[str, Any], rank: int, ranks: int) -> None:
        base = states["base_optimizer_state"] if "base_optimizer_state" in states else states["optimizer_state_dict"]
        if rank == 0:
            self.param_groups: list[dict[str, Any]] = base["param_groups"]
            self.scaler = {name: states[name] for name in ("loss_scaler", "dynamic_loss_scale", "overflow")}
        is_stage_3 = "fp32_flat_groups" in states
        weights = states["fp32_flat_groups" if is_stage_3 else "single_partition_of_fp32_groups"]
        for number, weight in enumerate(weights):
            state = base["state"].get(number, {})
            self.steps = state.get("step", self.steps)
            flat = {_WEIGHT: weight} | {name: state[name] for name in _MOMENTS if name in state}
            parts = (
                _parts_of_stage_3(self.model["param_shapes"][number], rank, ranks)
                if is_stage_3
                else [
                    (name, part.start, None, part.numel)
                    for name, part in states["param_slice_mappings"][number].items()
                ]
            )
            for name, offset, start, count in parts:
                pieces = self._pieces[name]
                # Under ZeRO 1 and 2 the ranks' parts of a parameter follow each other.
                begin = start if start is not None else sum(piece.count for piece in pieces)
                pieces.append(_Piece(begin, count, flat, offset))

    def names(self) -> set[str]:
        """The parameters that have states."""
        return set(self._pieces)

    def read(self, name: str, state: str, start: int, count: int) -> torch.Tensor:
        """A part of a parameter's weight or of one of its moments.

        Args:
            state: `fp32`, `exp_avg` or `exp_avg_sq`.
            start, count: elements of the flattened parameter.

        Raises:
            RunError: the checkpoint does not hold all of it.
        """
        found = torch.empty(count)
        filled = 0
        for piece in self._pieces.get(name, ()):
            first, end = max(start, piece.start), min(start + count, piece.start + piece.count)
            if first < end and state in piece.states:
                part = piece.states[state].narrow(0, piece.offset + first - piece.start, end - first)
                found.narrow(0, first - start, end - first).copy_(part)
                filled += end - first
        if filled != count:
            raise RunError(
                f"{self._folder}: has {filled} of {count} values of {name} ({state}): it is of another model"
            )
        return found


def load_resharded(engine: Any, folder: Path, progress: ByteProgress, *, trusted: bool) -> None:
    """Loads a checkpoint into a new engine, as `engine.load_checkpoint` does at the same number of ranks and stage.

    Args:
        engine: DeepSpeed's, under ZeRO 1, 2 or 3.
        trusted: whatever is in the checkpoint may be unpickled.

    Raises:
        RunError: the checkpoint is of another model, or cannot be loaded in this way.
    """
    optimizer, saved = engine.optimizer, SavedStates(folder, trusted=trusted)
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    trained = {name for parameter, name in names.items() if parameter.requires_grad}
    if trained != saved.names():
        only = sorted(trained ^ saved.names())[:3]
        raise RunError(f"{folder}: holds other trained parameters than this run has: {', '.join(only)}")
    stage_3 = engine.zero_optimization_partition_weights()
    if stage_3:
        optimizer.checkpoint_event_prologue()
        _fill_stage_3(optimizer, names, saved, progress)
        optimizer.checkpoint_event_epilogue()
    else:
        _fill_stage_2(optimizer, names, saved, progress)
        optimizer.update_lp_params()
    for group, before in zip(optimizer.optimizer.param_groups, saved.param_groups, strict=True):
        group.update({key: value for key, value in before.items() if key != "params"})
    optimizer.loss_scaler = saved.scaler["loss_scaler"]
    optimizer.dynamic_loss_scale, optimizer.overflow = saved.scaler["dynamic_loss_scale"], saved.scaler["overflow"]
    own = {name for name, _ in engine.module.named_buffers()}
    buffers = {name: tensor for name, tensor in saved.model["module"].items() if name in own}
    engine.module.load_state_dict(buffers, strict=False)
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(saved.model["lr_scheduler"])
    engine.global_steps, engine.skipped_steps = saved.model["global_steps"], saved.model["skipped_steps"]
    engine.global_samples = saved.model.get("global_samples", engine.global_steps * engine.train_batch_size())


@contextlib.contextmanager
def checkpoint_loading(
    resume: Path | None, shape: Mapping[str, Any], writer: RunWriter | None, *, trusted: bool
) -> Iterator[None]:
    """Lets the Trainer load a checkpoint by `load_resharded` where this run has another number of ranks or stage.

    Args:
        resume: the checkpoint; None without one.
        shape: of this run, as from `run_shape`.
        writer: shows the progress; None on other ranks than 0.
        trusted: whatever is in the checkpoint may be unpickled.
    """
    # The Trainer has no other place to choose how a checkpoint is loaded.
    module: Any = importlib.import_module("transformers.trainer")
    show = writer.progress if writer else None

    def load(engine: Any, checkpoint_path: str, load_module_strict: bool = True) -> None:
        progress = ByteProgress("loading states", factor=dist.get_world_size(), show=show)
        load_resharded(engine, Path(checkpoint_path), progress, trusted=trusted)

    if resume is None or not is_resharded(resume, shape):
        with restricted_unpickling(trusted=trusted):
            yield
        return
    with replaced(module, "deepspeed_load_checkpoint", load):
        yield


def _fill_stage_3(optimizer: Any, names: Mapping[Any, str], saved: SavedStates, progress: ByteProgress) -> None:
    rank = dist.get_rank(optimizer.dp_process_group)
    total = 12 * sum(flat.numel() for flat in optimizer.fp32_partitioned_groups_flat)
    done = 0
    for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        state = optimizer.optimizer.state[flat]
        offset = 0
        for parameter in optimizer.fp16_groups[number]:
            share = parameter.partition_numel()
            # The last rank's partition ends in padding.
            count = max(0, min(share, parameter.ds_numel - rank * share))
            _fill(saved, names[parameter], rank * share, count, flat, state, offset)
            offset += share
            done += 12 * count
            progress(done, total)
        _set_steps(optimizer.optimizer, state, saved)
        half = optimizer.fp16_partitioned_groups_flat[number]
        half.data.copy_(flat.data)
        parts = optimizer.unflatten(half, optimizer.fp16_partitioned_groups[number])
        for parameter, part in zip(optimizer.fp16_partitioned_groups[number], parts, strict=True):
            parameter.data = part.data
    progress.end(total)


def _fill_stage_2(optimizer: Any, names: Mapping[Any, str], saved: SavedStates, progress: ByteProgress) -> None:
    groups = optimizer.optimizer.param_groups
    total = 12 * sum(group["params"][0].numel() for group in groups)
    done = 0
    for number, group in enumerate(groups):
        flat = group["params"][0]
        state = optimizer.optimizer.state[flat]
        for parameter in optimizer.bit16_groups[number]:
            # None: no part of this parameter lies in this rank's partition.
            if (mapping := parameter._hp_mapping) is None:
                continue
            start, offset = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
            count = mapping.hp_fragment_address.numel
            _fill(saved, names[parameter], start, count, flat, state, offset)
            done += 12 * count
            progress(done, total)
        _set_steps(optimizer.optimizer, state, saved)
    progress.end(total)


def _fill(
    saved: SavedStates, name: str, start: int, count: int, flat: torch.Tensor, state: dict[str, Any], offset: int
) -> None:
    flat.data.narrow(0, offset, count).copy_(saved.read(name, _WEIGHT, start, count))
    for key in _MOMENTS:
        if key not in state:
            # Most optimizers create their states in the first step.
            state[key] = torch.zeros_like(flat)
        state[key].narrow(0, offset, count).copy_(saved.read(name, key, start, count))


def _set_steps(optimizer: Any, state: dict[str, Any], saved: SavedStates) -> None:
    if saved.steps is not None:
        # torch's AdamW counts in a tensor, DeepSpeed's in a number.
        is_torch = isinstance(optimizer, torch.optim.Adam)
        state["step"] = torch.tensor(float(saved.steps)) if is_torch else int(saved.steps)


def _parts_of_stage_3(shapes: Mapping[str, Any], rank: int, ranks: int) -> Iterator[tuple[str, int, int, int]]:
    """Name, offset in the rank's flat group, start in the parameter, and elements of each part of a rank."""
    offset = 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        share = math.ceil(numel / ranks)
        yield name, offset, rank * share, max(0, min(share, numel - rank * share))
        offset += share


def _states_of_ranks(folder: Path) -> list[Path]:
    """The files of all ranks' optimizer states in their order.

    Raises:
        RunError: one is missing.
    """
    found = {_rank_of(path): path for path in folder.glob("global_step*/*_optim_states.pt")}
    ranks = (read_record(folder / CHECKPOINT_RECORD) or {}).get("world_size", max(found, default=-1) + 1)
    missing = sorted(set(range(ranks)) - found.keys())
    if missing:
        raise RunError(
            f"{folder}: the optimizer states of ranks {', '.join(map(str, missing))} are not there; to go on with "
            "another number of ranks, every host needs the files of all: copy them from the other hosts"
        )
    return [found[rank] for rank in sorted(found)]


def _rank_of(path: Path) -> int:
    match = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(match[1]) if match else 0
