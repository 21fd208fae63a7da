"""Checks a merged folder against its base and adapters, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hynb.errors import MergeError
from hynb.files import read_json
from hynb.merge import shards
from hynb.merge.changes import Change, changed_tensor
from hynb.merge.pickled_base import as_safetensors
from hynb.merge.plan import MergePlan, plan_merge
from hynb.merge.receipt import RECEIPT
from hynb.merge.shards import TensorEntry
from hynb.merge.tensors import TORCH_DTYPES, read_tensor, tensor_bytes


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
        if plan.base_identity["hash"] != receipt["base"]["hash"]:
            raise MergeError(f"{base}: the base has changed since {output} was merged from it")
        return _compare(plan, output, progress)


def _compare(plan: MergePlan, output: Path, progress: Callable[[int, int], None] | None) -> int:
    merged = {entry.name: entry for entry in shards.entries(shards.model_shards(output))}
    base = {entry.name: entry for entry in plan.tensors()}
    problems = [f"{output}: tensor {name} is missing" for name in sorted(base.keys() - merged.keys())]
    problems += [
        f"{output}: tensor {name} does not belong to the base" for name in sorted(merged.keys() - base.keys())
    ]
    for count, (name, entry) in enumerate(base.items(), 1):
        if name in merged and not _is_expected(entry, merged[name], plan.changes.get(name, [])):
            problems.append(f"{merged[name].shard}: tensor {name} differs from what base and adapter give")
        if progress:
            progress(count, len(base))
    if problems:
        raise MergeError(problems)
    return len(base)


def _is_expected(base: TensorEntry, merged: TensorEntry, changes: Sequence[Change]) -> bool:
    if base.shape != merged.shape:
        return False
    if not changes and base.dtype == merged.dtype:
        return shards.read_bytes(base) == shards.read_bytes(merged)
    tensor = read_tensor(base)
    if changes:
        tensor = changed_tensor(tensor.float(), changes)
    return tensor_bytes(tensor.to(TORCH_DTYPES[merged.dtype])) == memoryview(shards.read_bytes(merged))
