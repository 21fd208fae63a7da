"""Computes changed tensors in pieces that fit into a core's cache, on all cores."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hynb.errors import MergeError, ModelError
from hynb.merge.changes import Change, Factors, changed_tensor
from hynb.merge.shards import DTYPE_BYTES, TensorEntry
from hynb.merge.tensors import TORCH_DTYPES, read_tensor, tensor_bytes

# Elements that a core computes at once: about a megabyte in float32 stays in its cache.
_PIECE_ELEMENTS = 1 << 18
# Elements that one task reads and writes: large enough for a disk.
_TASK_ELEMENTS = 1 << 20
# Factors that are kept: those of a layer of Hunyuan-Large at rank 64, for each shard that is written.
FACTOR_BYTES = 320 << 20
# Gets the bytes of a part of a tensor and their offset in it.
Take = Callable[[int, memoryview], None]


@dataclass(kw_only=True, frozen=True)
class TensorChange:
    """By how much a merge changed one tensor, over the absolute differences of its elements."""

    largest: float
    mean: float
    elements: int


class Computation:
    """Computes changed tensors; may be called from several threads.

    Args:
        pool: its threads compute.
        factor_bytes: how much of the adapters is kept in memory.
    """

    def __init__(self, pool: ThreadPoolExecutor, factor_bytes: int) -> None:
        self._pool = pool
        self._factors = Factors(factor_bytes)
        # A tensor that cannot be computed by rows is held whole, one at a time, which bounds the memory.
        self._whole = threading.Lock()
        self._local = threading.local()

    def compute(self, entry: TensorEntry, changes: Sequence[Change], dtype: str, take: Take) -> TensorChange:
        """Computes a tensor in float32, rounds it once, and hands its bytes over part by part, in any order.

        Args:
            dtype: of the result, as in safetensors files.
            take: called from several threads.

        Raises:
            MergeError: elements of the result are NaN or infinite.
        """
        if len(entry.shape) != 2 or not all(change.by_rows for change in changes):
            with self._whole:
                parts = [self._compute_whole(entry, changes, dtype, take)]
        else:
            rows, columns = entry.shape
            step = max(1, _TASK_ELEMENTS // max(1, columns))
            pieces = [range(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
            tasks = [self._pool.submit(self._compute_rows, entry, changes, dtype, take, piece) for piece in pieces]
            parts = [task.result() for task in tasks]
        elements = math.prod(entry.shape)
        total = sum(part[1] for part in parts)
        if not math.isfinite(total):
            raise MergeError(
                f"{entry.name}: the adapter makes elements of it NaN or infinite; no output folder was written"
            )
        return TensorChange(
            largest=max((part[0] for part in parts), default=0.0), mean=total / max(1, elements), elements=elements
        )

    def _compute_whole(
        self, entry: TensorEntry, changes: Sequence[Change], dtype: str, take: Take
    ) -> tuple[float, float]:
        before = read_tensor(entry).float()
        after = changed_tensor(before, changes, self._factors.read)
        take(0, tensor_bytes(after.to(TORCH_DTYPES[dtype])))
        return _difference(before, after)

    def _compute_rows(
        self, entry: TensorEntry, changes: Sequence[Change], dtype: str, take: Take, rows: range
    ) -> tuple[float, float]:
        """Computes some rows; returns the largest absolute difference and the sum of all."""
        columns = entry.shape[1]
        source = self._buffer("source", len(rows), columns, TORCH_DTYPES[entry.dtype])
        result = self._buffer("result", len(rows), columns, TORCH_DTYPES[dtype])
        _read_rows(entry, rows, source)
        largest, total, step = 0.0, 0.0, max(1, _PIECE_ELEMENTS // max(1, columns))
        for begin in range(0, len(rows), step):
            piece = slice(begin, min(begin + step, len(rows)))
            count = piece.stop - piece.start
            values, scratch = (self._buffer(name, count, columns, torch.float32) for name in ("values", "scratch"))
            values.copy_(source[piece])
            for change in changes:
                within = slice(rows.start + piece.start, rows.start + piece.stop)
                change.apply_to_rows(values, self._factors.read, within, scratch)
            result[piece].copy_(values)
            if len(changes) != 1 or not changes[0].leaves_difference:
                scratch.copy_(source[piece])
                scratch.sub_(values)
            largest = max(largest, scratch.abs_().aminmax().max.item())
            # NaN or infinite if an element is.
            total += scratch.sum().item()
        take(rows.start * columns * DTYPE_BYTES[dtype], tensor_bytes(result))
        return largest, total

    def _buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of this thread: new memory for each piece would have to be cleared by the system first."""
        kept = self._local.__dict__.get(name)
        if kept is None or kept.dtype != dtype or kept.numel() < rows * columns:
            kept = self._local.__dict__[name] = torch.empty(rows * columns, dtype=dtype)
        return kept[: rows * columns].view(rows, columns)


@contextmanager
def computation(shard_threads: int = 1) -> Iterator[Computation]:
    """A computation on all cores.

    Args:
        shard_threads: how many threads call it at the same time.
    """
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0))
    try:
        # Each task computes on one core.
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield Computation(pool, FACTOR_BYTES * shard_threads)
    finally:
        torch.set_num_threads(threads)


def _difference(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """The largest absolute difference and the sum of all, which is NaN or infinite if one of them is."""
    difference = (after - before).abs_()
    if not difference.numel():
        return 0.0, 0.0
    return difference.max().item(), difference.sum(dtype=torch.float64).item()


def _read_rows(entry: TensorEntry, rows: range, target: torch.Tensor) -> None:
    """Reads rows of a matrix in a weight file."""
    view = tensor_bytes(target)
    with entry.shard.open("rb", buffering=0) as file:
        file.seek(entry.begin + rows.start * entry.shape[1] * DTYPE_BYTES[entry.dtype])
        while view:
            count = file.readinto(view)
            if not count:
                raise ModelError(f"{entry.shard}: the file ends inside tensor {entry.name}")
            view = view[count:]
