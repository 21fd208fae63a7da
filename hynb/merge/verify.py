"""Checks a merged folder against its base and adapters, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from hynb.errors import MergeError
from hynb.files import read_json
from hynb.merge import shards
from hynb.merge.pickled_base import as_safetensors
from hynb.merge.plan import Change, MergePlan, changed_tensor, plan_merge
from hynb.merge.shards import TensorEntry
from hynb.merge.write import RECEIPT, TORCH_DTYPES, _bytes_of


def verify_merge(output_path: str | Path, *, progress: Callable[[int, int], None] | None = None) -> int:
    """Reads a merged folder back: copied tensors are identical to the base's, changed ones computed anew.

    Returns:
        how many tensors were compared.

    Raises:
        MergeError: each tensor that differs, by name; or base and adapters are no longer what they were.
    """
    output = Path(output_path).absolute()
    receipt = read_json(output / RECEIPT)
    if receipt is None:
        raise MergeError(f"{output}: has no {RECEIPT}: it was not made by hynb merge")
    base = Path(receipt["base"]["path"])
    adapters = [Path(item["path"]) for item in receipt["adapters"]]
    weights = [item["weight"] for item in receipt["adapters"]]
    with as_safetensors(base, output.with_name(f"{output.name}.verify")) as source:
        plan = plan_merge(source, adapters, weights, original=base)
        if plan.base_identity["hash"] != receipt["base"]["hash"]:
            raise MergeError(f"{base}: is not the base that {output} was merged from: it has changed since")
        return _compare(plan, output, progress)


def _compare(plan: MergePlan, output: Path, progress: Callable[[int, int], None] | None) -> int:
    made = {entry.name: entry for entry in shards.entries(shards.model_shards(output))}
    originals = {entry.name: entry for entry in shards.entries(plan.shards)}
    if plan.untied:
        originals[plan.untied.name] = plan.untied
    problems = [f"{output}: tensor {name} is missing" for name in sorted(originals.keys() - made.keys())]
    problems += [f"{output}: tensor {name} is not the base's" for name in sorted(made.keys() - originals.keys())]
    for count, (name, original) in enumerate(originals.items(), 1):
        if name in made and not _as_expected(original, made[name], plan.changes.get(name, [])):
            problems.append(f"{made[name].shard}: tensor {name} is not what base and adapter make")
        if progress:
            progress(count, len(originals))
    if problems:
        raise MergeError(problems)
    return len(originals)


def _as_expected(original: TensorEntry, made: TensorEntry, changes: list[Change]) -> bool:
    if original.shape != made.shape:
        return False
    if not changes and original.dtype == made.dtype:
        return shards.read_bytes(original) == shards.read_bytes(made)
    tensor = torch.frombuffer(shards.read_bytes(original), dtype=TORCH_DTYPES[original.dtype])
    if changes:
        tensor = changed_tensor(tensor.view(original.shape).float(), changes)
    return bytes(_bytes_of(tensor.to(TORCH_DTYPES[made.dtype]))) == bytes(shards.read_bytes(made))
