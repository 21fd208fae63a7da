"""Computes changed tensors in blocks that fit into a core's cache, on all cores."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from hynb.errors import MergeError
from hynb.merge.changes import Change, ChangeBlock, Factors, changed_tensor
from hynb.merge.shards import DTYPE_BYTES, TensorEntry, read_at
from hynb.merge.tensors import TORCH_DTYPES, Buffers, read_tensor, tensor_bytes

# Elements that a core computes at once: with both dtypes and a factor about 1.5 MB, which stays in its cache.
_BLOCK_ELEMENTS = 1 << 17
# A block of a few long rows would multiply three times as slowly, and not with the bits of the whole product.
_BLOCK_COLUMNS = 2048
# Elements, and rows of a matrix, that one task reads and writes: large enough for a disk, and for the columns of a
# factor to be used often.
_TASK_ELEMENTS, _TASK_ROWS = 1 << 20, 128
# Factors that are kept: those of a layer of Hunyuan-Large at rank 64, for each shard that is written.
FACTOR_BYTES = 320 << 20
# Gets the bytes of a part of a tensor and their offset in it.
Take = Callable[[int, memoryview], None]
T = TypeVar("T")


@dataclass(kw_only=True, frozen=True)
class TensorChange:
    """By how much a merge changed one tensor, over the absolute differences of its elements."""

    largest: float
    mean: float
    elements: int


@dataclass(kw_only=True, frozen=True)
class _Job:
    """One tensor that is computed: its open file, its changes in blocks, and what takes the result."""

    entry: TensorEntry
    file_number: int
    blocks: Sequence[ChangeBlock]
    dtype: str
    take: Take


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
        self._buffers = Buffers()

    def compute(self, entry: TensorEntry, changes: Sequence[Change], dtype: str, take: Take) -> TensorChange:
        """Computes a tensor in float32, rounds it once, and hands its bytes over part by part, in any order.

        Args:
            changes: none to convert the tensor.
            dtype: of the result, as in safetensors files.
            take: called from several threads.

        Raises:
            MergeError: elements of the result are NaN or infinite.
        """
        elements = math.prod(entry.shape)
        if changes and (len(entry.shape) != 2 or not all(change.by_rows for change in changes)):
            with self._whole:
                parts = [self._compute_whole(entry, changes, dtype, take)]
        else:
            blocks = [change.by_blocks(self._factors.read) for change in changes]
            with entry.shard.open("rb", buffering=0) as file:
                job = _Job(entry=entry, file_number=file.fileno(), blocks=blocks, dtype=dtype, take=take)
                if changes:
                    rows, columns = entry.shape
                    step = max(_TASK_ROWS, _TASK_ELEMENTS // max(1, columns))
                    parts = self.run(partial(self._compute_rows, job), rows if elements else 0, step)
                else:
                    parts = self.run(partial(self._convert, job), elements, _TASK_ELEMENTS)
        total = sum(part[1] for part in parts)
        if not math.isfinite(total):
            raise MergeError(
                f"{entry.name}: the adapter makes elements of it NaN or infinite; no output folder was written"
            )
        return TensorChange(
            largest=max((part[0] for part in parts), default=0.0), mean=total / max(1, elements), elements=elements
        )

    def run(self, work: Callable[[range], T], end: int, step: int) -> list[T]:
        """Calls a function with the parts of the range up to `end` on all cores; waits until all have returned."""
        tasks = [self._pool.submit(work, range(begin, min(begin + step, end))) for begin in range(0, end, step)]
        # All of them, also if one fails: the caller closes the files that they use.
        wait(tasks)
        return [task.result() for task in tasks]

    def _compute_whole(
        self, entry: TensorEntry, changes: Sequence[Change], dtype: str, take: Take
    ) -> tuple[float, float]:
        before = read_tensor(entry).float()
        after = changed_tensor(before, changes, self._factors.read)
        take(0, tensor_bytes(after.to(TORCH_DTYPES[dtype])))
        return _difference(before, after)

    def _compute_rows(self, job: _Job, rows: range) -> tuple[float, float]:
        """Computes some rows; returns the largest absolute difference and the sum of all."""
        columns = job.entry.shape[1]
        source, result = (part.view(len(rows), columns) for part in self._read(job, rows, columns))
        # Blocks of about the same width, in whole lines of a cache.
        width = -(-columns // -(-columns // _BLOCK_COLUMNS) // 64) * 64
        height = _BLOCK_ELEMENTS // width
        largest, total, left = 0.0, 0.0, 0
        # Rows inside: the columns of a factor stay in the cache.
        for sources, results in zip(source.split(width, 1), result.split(width, 1), strict=True):
            top = rows.start
            for before, after in zip(sources.split(height), results.split(height), strict=True):
                part = self._compute_block(job, before, after, top, left)
                largest, total, top = max(largest, part[0]), total + part[1], top + height
            left += width
        job.take(rows.start * columns * DTYPE_BYTES[job.dtype], tensor_bytes(result))
        return largest, total

    def _compute_block(
        self, job: _Job, source: torch.Tensor, result: torch.Tensor, top: int, left: int
    ) -> tuple[float, float]:
        values = self._buffers.matrix("values", source.shape)
        difference = self._buffers.matrix("difference", source.shape)
        values.copy_(source)
        scale = None
        for change in job.blocks:
            scale = change(values, top, left, difference)
        if len(job.blocks) != 1 or scale is None:
            difference.copy_(source)
            difference.sub_(values)
            scale = 1.0
        # The last use of the source, whose memory it may be.
        result.copy_(values)
        # Three passes in the cache; aminmax and vector_norm take several times as long. The sum is NaN or infinite if
        # an element is.
        difference.abs_()
        return scale * difference.amax().item(), scale * difference.sum().item()

    def _convert(self, job: _Job, elements: range) -> tuple[float, float]:
        """Writes a range of elements in another dtype."""
        source, result = self._read(job, elements, 1)
        if result is source:
            pass
        elif job.dtype == "F32" or job.entry.dtype in ("F32", "F64"):
            result.copy_(source)
        else:
            # Through float32, which holds both exactly: several times as fast as directly.
            for begin in range(0, len(elements), _BLOCK_ELEMENTS):
                part = slice(begin, min(begin + _BLOCK_ELEMENTS, len(elements)))
                values = self._buffers.get("values", part.stop - part.start, torch.float32)
                result[part].copy_(values.copy_(source[part]))
        job.take(elements.start * DTYPE_BYTES[job.dtype], tensor_bytes(result))
        return 0.0, 0.0

    def _read(self, job: _Job, rows: range, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The elements of some rows, and memory for as many elements of the result."""
        elements = len(rows) * columns
        source = self._buffers.get("source", elements, TORCH_DTYPES[job.entry.dtype])
        offset = rows.start * columns * DTYPE_BYTES[job.entry.dtype]
        read_at(job.file_number, tensor_bytes(source), job.entry, offset)
        # In the same memory if possible, which is in the cache when the result is written.
        same = job.dtype == job.entry.dtype
        return source, source if same else self._buffers.get("result", elements, TORCH_DTYPES[job.dtype])


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
