"""Saving a full model: all ranks write together, each the parts that it holds, straight into the weight files.

transformers and DeepSpeed would gather the whole model in the memory of rank 0, which then writes alone (DeepSpeed
0.19.8, runtime/engine.py `_zero3_consolidated_16bit_state_dict`).
"""

from __future__ import annotations

import math
import socket
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from hynb.errors import ModelError, RunError
from hynb.files import INDEX_NAME, write_json
from hynb.merge import DTYPE_BYTES, TORCH_DTYPES, TensorEntry, copy_range, file_header, write_at
from hynb.train.byte_progress import ByteProgress
from hynb.train.gathering import of_all_ranks
from hynb.train.router_precision import optimizer_weights
from hynb.train.router_statistics import routers
from hynb.train.staging import PIECE_BYTES, Staging
from hynb.train.stored_tensors import Part, stored_parts

_STORED_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# Of a model without a base; transformers' own limit was as high for years.
_SHARD_BYTES = 5_000_000_000
_WRITERS = 2


@dataclass(kw_only=True, frozen=True)
class SavedTensor:
    """A tensor of a full checkpoint, and where its values come from.

    Args:
        dtype: as in safetensors files.
        copied: the base's tensor, where it is kept unchanged.
        parameter: otherwise the parameter or buffer of the model.
        begin: the tensor's first element in the flattened parameter.
        start: the float32 tensor of the base with which the optimizer's float32 weight begins, and which is saved
            from there; of trained routers alone, which are small.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    copied: TensorEntry | None = None
    parameter: str = ""
    begin: int = 0
    start: TensorEntry | None = None

    @property
    def size_bytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(kw_only=True, frozen=True)
class SavedShard:
    """A weight file of a full checkpoint, with its tensors in the order of their data."""

    file: str
    tensors: tuple[SavedTensor, ...]

    @property
    def header(self) -> bytes:
        """The bytes of the file before the data."""
        tensors = ((tensor.name, tensor.dtype, tensor.shape) for tensor in self.tensors)
        return file_header(tensors, {"format": "pt"})


def plan_shards(
    model: PreTrainedModel,
    base: Sequence[TensorEntry],
    copied: Sequence[TensorEntry],
    *,
    dtype: torch.dtype,
    has_index: bool,
) -> list[SavedShard]:
    """The weight files of each full checkpoint: names, files and float32 tensors as in the base.

    Released models have float32 routers, and hy_v3 a float32 bias by which experts are chosen, beside bfloat16
    weights. DeepSpeed rounds all weights to the training's dtype. Those tensors are saved in float32 as in the base,
    and with the base's own values where they are not trained. Untrained tensors are the base's in any case.

    Args:
        base: the tensors of the base; empty for a random model, or a base in other files than safetensors.
        copied: tensors of the base that the model does not have, and which a checkpoint gets unchanged.
        dtype: of the weights in training, to which DeepSpeed will cast all of them.
        has_index: whether the base has an index beside its weight files.

    Raises:
        ModelError: transformers changes the weights of this model at loading in a way that hynb cannot undo.
    """
    names = set(model.state_dict()) - set(getattr(model, "all_tied_weights_keys", None) or ())
    shapes = {entry.name: entry.shape for entry in base}
    parts = stored_parts(model, shapes)
    if parts is None or not names <= parts.keys():
        whole = {name: torch.empty(_shape(value), dtype=value.dtype, device="meta") for name, value in _values(model)}
        stored = revert_weight_conversion(model, {name: whole[name] for name in names})
        shapes = {name: tuple(value.shape) for name, value in stored.items()}
        parts = stored_parts(model, shapes)
    if parts is None or not names <= parts.keys():
        raise ModelError(
            f"{type(model).__name__}: transformers changes its weights when it loads them, and hynb cannot save them "
            "in their form on the disk. Train an adapter (use_lora) instead"
        )
    found = _saved_tensors(model, {name: parts[name] for name in names}, shapes, base, dtype)
    found |= {entry.name: _copy_of(entry) for entry in copied}
    if not base:
        return _new_layout(found)
    files = {entry.name: entry.shard.name for entry in base}
    layout: dict[str, list[SavedTensor]] = {file: [] for file in sorted(set(files.values()))}
    for entry in base:
        if entry.name in found:
            layout[entry.shard.name].append(found[entry.name])
    if set(found) - files.keys():
        return _new_layout(found)
    layout = {file: tensors for file, tensors in layout.items() if tensors}
    if len(layout) == 1 and not has_index:
        layout = {"model.safetensors": next(iter(layout.values()))}
    return [SavedShard(file=file, tensors=tuple(tensors)) for file, tensors in layout.items()]


def trained_float32_routers(shards: Sequence[SavedShard]) -> dict[str, TensorEntry]:
    """The base's float32 tensors of routers that are trained in a lower precision, by names of parameters."""
    return {tensor.parameter: tensor.start for shard in shards for tensor in shard.tensors if tensor.start}


def write_model(
    model: PreTrainedModel, shards: Sequence[SavedShard], folder: Path, *, shared: bool, progress: ByteProgress
) -> None:
    """Writes the weight files of a checkpoint; every rank calls it, and returns when all files are complete.

    Args:
        shared: all ranks see the folder; otherwise only rank 0 writes, and gathers one parameter at a time.

    Raises:
        RunError: a rank cannot write; raised on all ranks, with the rank and its host.
    """
    rank = dist.get_rank()
    values = dict(_values(model)) | optimizer_weights(model, trained_float32_routers(shards))
    with agreed(folder):
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for shard in shards:
                _create(folder / shard.file, shard)
    with agreed(folder):
        if shared or rank == 0 or _is_partitioned(model):
            _Writer(values, shards, folder, shared=shared, progress=progress).write()
    # The index comes last: a folder without it is not a whole model.
    if rank == 0 and (len(shards) > 1 or shards[0].file != "model.safetensors"):
        weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
        total_bytes = sum(tensor.size_bytes for shard in shards for tensor in shard.tensors)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_NAME, index)


@contextmanager
def agreed(folder: Path) -> Iterator[None]:
    """Work after which all ranks fail if one of them does."""
    failure: Exception | None = None
    try:
        yield
    except (OSError, ModelError) as error:
        failure = error
    problem = None
    if failure is not None:
        place = f"rank {dist.get_rank()} on {socket.gethostname()}"
        problem = f"{folder}: the checkpoint cannot be written by {place}: {failure}"
    if found := [text for text in of_all_ranks(problem) if text]:
        raise RunError(found) from failure


class _Writer:
    """Writes one rank's part of all weight files."""

    def __init__(
        self,
        values: Mapping[str, Any],
        shards: Sequence[SavedShard],
        folder: Path,
        *,
        shared: bool,
        progress: ByteProgress,
    ) -> None:
        self._values = values
        self._shards, self._folder, self._shared = shards, folder, shared
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._progress = progress
        self._total = sum(tensor.size_bytes for shard in shards for tensor in shard.tensors)
        self._done = 0
        self._lock = threading.Lock()
        self._staging = Staging()

    def write(self) -> None:
        with ExitStack() as stack:
            files = {}
            if self._shared or self._rank == 0:
                for shard in self._shards:
                    opened = stack.enter_context((self._folder / shard.file).open("r+b", buffering=0))
                    files[shard.file] = opened.fileno()
            pool = stack.enter_context(ThreadPoolExecutor(_WRITERS))
            # The kernel lets one process at a time write into a file, so that each rank begins with another one.
            first = self._rank * len(self._shards) // self._world_size if self._shared else 0
            for shard in [*self._shards[first:], *self._shards[:first]]:
                file_number = files.get(shard.file)
                position = len(shard.header)
                futures = []
                for tensor in shard.tensors:
                    value = self._values.get(tensor.parameter)
                    if hasattr(value, "ds_tensor") and not self._shared:
                        self._gather_and_write(file_number, value, tensor, position)
                    elif file_number is not None:
                        copied = tensor.copied
                        tasks = self._copies(copied, position) if copied else self._own(value, tensor, position)
                        futures += [pool.submit(self._run, file_number, *task) for task in tasks]
                    position += tensor.size_bytes
                for future in futures:
                    future.result()

    def _run(self, file_number: int, source: Any, dtype: str, offset: int) -> None:
        if isinstance(source, tuple):
            entry, begin, end = source
            with entry.shard.open("rb", buffering=0) as base_file:
                copy_range(base_file.fileno(), file_number, begin, end, at=offset, advance=self._advance)
            return
        write_at(file_number, self._bytes(source, dtype), offset)
        self._advance(source.numel() * DTYPE_BYTES[dtype])

    def _copies(self, entry: TensorEntry, position: int) -> Iterator[tuple[Any, str, int]]:
        for begin in range(entry.begin, entry.end, PIECE_BYTES):
            offset = position + begin - entry.begin
            if self._is_mine(offset):
                yield (entry, begin, min(begin + PIECE_BYTES, entry.end)), entry.dtype, offset

    def _own(self, value: Any, tensor: SavedTensor, position: int) -> Iterator[tuple[Any, str, int]]:
        """The pieces of a tensor that this rank writes: of its partition, or its share of what all ranks have."""
        count, item_bytes = math.prod(tensor.shape), DTYPE_BYTES[tensor.dtype]
        partition = getattr(value, "ds_tensor", None)
        flat = value.data.reshape(-1) if partition is None else partition.data
        first = 0 if partition is None else dist.get_rank(value.ds_process_group) * flat.numel()
        begin, end = max(first, tensor.begin), min(first + flat.numel(), tensor.begin + count)
        step = PIECE_BYTES // item_bytes
        for at in range(begin, end, step):
            offset = position + (at - tensor.begin) * item_bytes
            if partition is not None or self._is_mine(offset):
                yield flat[at - first : min(at + step, end) - first], tensor.dtype, offset

    def _gather_and_write(self, file_number: int | None, value: Any, tensor: SavedTensor, position: int) -> None:
        """Rank 0 writes a tensor of a partitioned parameter that is gathered for it."""
        with deepspeed.zero.GatheredParameters([value]):
            if file_number is not None:
                flat = value.data.reshape(-1)[tensor.begin : tensor.begin + math.prod(tensor.shape)]
                step = PIECE_BYTES // DTYPE_BYTES[tensor.dtype]
                for at in range(0, flat.numel(), step):
                    offset = position + at * DTYPE_BYTES[tensor.dtype]
                    self._run(file_number, flat[at : at + step], tensor.dtype, offset)

    def _is_mine(self, offset: int) -> bool:
        """Whether a piece of what all ranks have, which is to stand there in its file, is this rank's to write."""
        return offset // PIECE_BYTES % self._world_size == self._rank or not self._shared

    def _bytes(self, piece: torch.Tensor, dtype: str) -> memoryview:
        target = TORCH_DTYPES[dtype]
        piece = piece.detach()
        if piece.device.type == "cpu":
            return _view(piece.to(target).contiguous())
        staging = self._staging.bytes(piece.numel() * target.itemsize, pinned=True).view(target)
        staging.copy_(piece)
        return _view(staging)

    def _advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            share = self._total // self._world_size if self._shared else self._total
            self._progress(min(self._done, share), share)


def _saved_tensors(
    model: PreTrainedModel,
    parts: Mapping[str, Sequence[Part]],
    shapes: Mapping[str, tuple[int, ...]],
    base: Sequence[TensorEntry],
    training_dtype: torch.dtype,
) -> dict[str, SavedTensor]:
    """The tensors of a checkpoint that the model has, by their names in weight files."""
    entries = {entry.name: entry for entry in base}
    float32 = _float32_beside_lower(base)
    trained = {name for name, weight in model.named_parameters(remove_duplicate=False) if weight.requires_grad}
    of_routers = {
        f"{name}.{part}"
        for name, router in routers(model, model.config.model_type)
        for part, _ in router.named_parameters()
    }
    exact = trained & of_routers if training_dtype != torch.float32 else set()
    found: dict[str, SavedTensor] = {}
    values = dict(_values(model))
    for name, pieces in parts.items():
        is_weight = isinstance(values[name], torch.nn.Parameter)
        dtype = _STORED_DTYPES.get(training_dtype if is_weight else values[name].dtype)
        if dtype is None:
            raise ModelError(f"{name} has the dtype {values[name].dtype}, which cannot be saved")
        for part in pieces:
            entry = entries.get(part.stored)
            if (
                entry
                and name not in trained
                and (entry.dtype == dtype or name in of_routers or entry.name in float32)
            ):
                found[part.stored] = _copy_of(entry)
                continue
            found[part.stored] = SavedTensor(
                name=part.stored,
                dtype="F32" if part.stored in float32 else dtype,
                shape=shapes[part.stored],
                parameter=name,
                begin=part.at,
                start=entry if part.stored in float32 and name in exact else None,
            )
    return found


def _float32_beside_lower(tensors: Iterable[TensorEntry]) -> set[str]:
    """Names of the float32 tensors of a model most of whose bytes have another dtype."""
    sizes: Counter[str] = Counter()
    names = set()
    for entry in tensors:
        sizes[entry.dtype] += entry.size_bytes
        if entry.dtype == "F32":
            names.add(entry.name)
    return names if sizes and sizes.most_common(1)[0][0] != "F32" else set()


def _copy_of(entry: TensorEntry) -> SavedTensor:
    return SavedTensor(name=entry.name, dtype=entry.dtype, shape=entry.shape, copied=entry)


def _new_layout(tensors: Mapping[str, SavedTensor]) -> list[SavedShard]:
    """Files of at most 5 GB, as transformers names them."""
    groups: list[list[SavedTensor]] = [[]]
    size_bytes = 0
    for _, tensor in sorted(tensors.items()):
        if groups[-1] and size_bytes + tensor.size_bytes > _SHARD_BYTES:
            groups.append([])
            size_bytes = 0
        groups[-1].append(tensor)
        size_bytes += tensor.size_bytes
    if len(groups) == 1:
        return [SavedShard(file="model.safetensors", tensors=tuple(groups[0]))]
    names = (f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1))
    return [SavedShard(file=name, tensors=tuple(group)) for name, group in zip(names, groups, strict=True)]


def _create(path: Path, shard: SavedShard) -> None:
    """A file of its full size with a header and no values yet."""
    with path.open("wb") as file:
        file.write(shard.header)
        file.truncate(len(shard.header) + sum(tensor.size_bytes for tensor in shard.tensors))


def _values(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Parameters and buffers that the model's state_dict has."""
    names = set(model.state_dict())
    for name, value in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        if name in names:
            yield name, value


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "ds_shape", value.shape))


def _is_partitioned(model: PreTrainedModel) -> bool:
    return any(hasattr(weight, "ds_tensor") for weight in model.parameters())


def _view(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy().data)
