"""Checks a merged folder against its base and adapters, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from hynb.errors import MergeError
from hynb.files import read_json
from hynb.merge import shards
from hynb.merge.changes import Change
from hynb.merge.computation import Computation, computation
from hynb.merge.pickled_base import as_safetensors
from hynb.merge.plan import MergePlan, plan_merge
from hynb.merge.receipt import RECEIPT
from hynb.merge.shards import TensorEntry
from hynb.merge.tensors import Buffers, same_bytes, tensor_bytes
from hynb.runs import same_base

# Tensors that are compared at the same time.
_THREADS = 16
# What a task compares, in blocks of which one of each file stays in a core's cache.
_TASK_BYTES, _BLOCK_BYTES = 8 << 20, 512 << 10
_buffers = Buffers()


def verify_merge(output_path: str | Path, *, progress: Callable[[int, int], None] | None = None) -> int:
    """Reads a merged folder back: copied tensors must be identical to the base's, changed ones are recomputed.

    Args:
        output_path: a folder that `merge_lora` wrote.
        progress: called with the number of compared tensors and the number of all tensors.

    Returns:
        the number of tensors that were compared.

    Raises:
        MergeError: every tensor that differs, by name; or the base or an adapter has changed since the merge.
    """
    output = Path(output_path).expanduser().absolute()
    receipt = read_json(output / RECEIPT)
    if receipt is None:
        raise MergeError(f"{output}: has no {RECEIPT}, so it was not written by hynb merge")
    base = Path(receipt["base"]["path"])
    adapters = [Path(item["path"]) for item in receipt["adapters"]]
    weights = [item["weight"] for item in receipt["adapters"]]
    with as_safetensors(base, output.with_name(f"{output.name}.verify")) as source:
        plan = plan_merge(source, adapters, weights, converted_from=base)
        if not same_base(receipt["base"], plan.base_identity):
            raise MergeError(f"{base}: the base has changed since {output} was merged from it")
        return _compare(plan, output, progress)


def _compare(plan: MergePlan, output: Path, progress: Callable[[int, int], None] | None) -> int:
    merged = {entry.name: entry for entry in shards.entries(shards.model_shards(output))}
    base = {entry.name: entry for entry in plan.tensors()}
    problems = [f"{output}: tensor {name} is missing" for name in sorted(base.keys() - merged.keys())]
    problems += [
        f"{output}: tensor {name} does not belong to the base" for name in sorted(merged.keys() - base.keys())
    ]
    threads = min(_THREADS, os.cpu_count() or 1)
    with computation(threads) as computing, ThreadPoolExecutor(threads) as pool:

        def differs(name: str) -> bool:
            return not _is_expected(base[name], merged[name], plan.changes.get(name, []), computing)

        present = [name for name in base if name in merged]
        for count, (name, different) in enumerate(zip(present, pool.map(differs, present), strict=True), 1):
            if different:
                problems.append(f"{merged[name].shard}: tensor {name} differs from what base and adapter give")
            if progress:
                progress(count, len(base))
    if problems:
        raise MergeError(problems)
    return len(base)


def _is_expected(base: TensorEntry, merged: TensorEntry, changes: Sequence[Change], computing: Computation) -> bool:
    if base.shape != merged.shape:
        return False
    with base.shard.open("rb", buffering=0) as source, merged.shard.open("rb", buffering=0) as result:
        if not changes and base.dtype == merged.dtype:

            def same(part: range) -> bool:
                blocks = range(part.start, part.stop, _BLOCK_BYTES)
                return all(
                    same_bytes(
                        _read("base", source.fileno(), base, begin, min(_BLOCK_BYTES, part.stop - begin)),
                        _read("merged", result.fileno(), merged, begin, min(_BLOCK_BYTES, part.stop - begin)),
                    )
                    for begin in blocks
                )

            return all(computing.run(same, base.size_bytes, _TASK_BYTES))
        equal: list[bool] = []

        def compare(offset: int, data: memoryview) -> None:
            equal.append(same_bytes(_read("merged", result.fileno(), merged, offset, len(data)), data))

        computing.compute(base, changes, merged.dtype, compare)
        return all(equal)


def _read(name: str, file_number: int, entry: TensorEntry, begin: int, size_bytes: int) -> memoryview:
    """Bytes of a tensor in its open file."""
    data = tensor_bytes(_buffers.get(name, size_bytes, torch.uint8))
    shards.read_at(file_number, data, entry, begin)
    return data
