"""What a merge will change: base and adapters are checked against each other before a byte is written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hynb.errors import MergeError
from hynb.families import FAMILIES
from hynb.files import read_json
from hynb.merge import shards
from hynb.merge.adapter import Adapter, open_adapter
from hynb.merge.changes import Change
from hynb.merge.matching import match_adapter
from hynb.merge.shards import Shard, TensorEntry
from hynb.merge.tensors import TORCH_DTYPES
from hynb.runs import BASE_IDENTITY, base_identity, read_record, same_base

_HEAD, _EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(kw_only=True)
class MergePlan:
    """Everything that a merge needs to know before it writes.

    Args:
        base: the folder whose weight files are read.
        shards: the weight files.
        changes: the changes of each tensor that an adapter touches, by name.
        base_identity: identity of the base model, as the receipt of the merge records it.
        adapter_identities: path, hash, size and weight of each adapter.
        untied: an output layer that gets a tensor of its own, because an adapter changes either it or the embeddings
            that the base has it tied to; the byte range is that of the embeddings. PEFT's own merge changes
            both, and its merged model then answers differently from base and adapter.
        mtp_tensors: number of the base's tensors that belong to MTP layers.
    """

    base: Path
    shards: list[Shard]
    changes: dict[str, list[Change]]
    base_identity: dict[str, Any]
    adapter_identities: list[dict[str, Any]]
    untied: TensorEntry | None = None
    mtp_tensors: int = 0

    @property
    def fingerprint(self) -> str:
        """A hash of the inputs, by which an interrupted merge of the same inputs is recognised."""
        inputs = {"base": self.base_identity, "adapters": self.adapter_identities}
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def tensors(self) -> list[TensorEntry]:
        """Every tensor that the merged model has, as the base stores it."""
        return [*shards.entries(self.shards), *([self.untied] if self.untied else [])]


def plan_merge(
    base: Path,
    adapters: Sequence[Path],
    weights: Sequence[float] | None = None,
    *,
    converted_from: Path | None = None,
) -> MergePlan:
    """Matches every key of every adapter to a tensor of the base.

    Args:
        base: folder of a model in safetensors files.
        adapters: folders of the adapters, in the order in which they are merged.
        weights: factor of each adapter; 1 by default.
        converted_from: the folder whose weights were converted into `base`; its identity is the base's.

    Raises:
        MergeError: everything that cannot be merged, by name.
        ModelError: the base folder is incomplete or corrupt.
    """
    weights = list(weights or [1.0] * len(adapters))
    if len(weights) != len(adapters):
        raise MergeError(f"adapter_weights: {len(weights)} factors for {len(adapters)} adapters; give one for each")
    model_config = _base_config(base)
    family = FAMILIES.get(model_config.get("model_type") or "")
    base_shards = shards.model_shards(base)
    tensors = {entry.name: entry for entry in shards.entries(base_shards)}
    untied = None
    if model_config.get("tie_word_embeddings") and _HEAD not in tensors and _EMBEDDINGS in tensors:
        untied = tensors[_HEAD] = dataclasses.replace(tensors[_EMBEDDINGS], name=_HEAD)
    identity = base_identity(converted_from or base)
    opened = [
        open_adapter(folder.expanduser().absolute(), weight) for folder, weight in zip(adapters, weights, strict=True)
    ]
    changes: dict[str, list[Change]] = {}
    problems: list[str] = []
    for adapter in opened:
        found = match_adapter(adapter, tensors, stored_name=family.stored_name if family else str)
        problems += [*adapter.problems(), *_other_base(adapter, identity), *found.problems]
        for name, added in found.changes.items():
            changes.setdefault(name, []).extend(added)
    problems += [
        f"{tensors[name].shard}: {name} has dtype {tensors[name].dtype}, which an adapter cannot be merged into; "
        "merge into the bf16 or fp16 model"
        for name in changes
        if tensors[name].dtype not in TORCH_DTYPES
    ]
    if problems:
        raise MergeError(problems)
    return MergePlan(
        base=base,
        shards=base_shards,
        changes=changes,
        base_identity=identity,
        adapter_identities=[adapter.identity() for adapter in opened],
        untied=untied if {_HEAD, _EMBEDDINGS} & changes.keys() else None,
        mtp_tensors=sum(family.is_mtp_tensor(name, model_config) for name in tensors) if family else 0,
    )


def _base_config(base: Path) -> dict[str, Any]:
    if not base.is_dir():
        raise MergeError(f"base_model_path = {base}: there is no such folder")
    model_config = read_json(base / "config.json")
    if model_config is None:
        raise MergeError(f"base_model_path = {base}: has no config.json, so it is not a model folder")
    if "quantization_config" in model_config:
        raise MergeError(f"base_model_path = {base}: the model is quantised; merge into the bf16 or fp16 model")
    return model_config


def _other_base(adapter: Adapter, identity: dict[str, Any]) -> list[str]:
    """A message if the adapter's folder records that it was trained on another base."""
    recorded = read_record(adapter.folder / BASE_IDENTITY)
    if not recorded or same_base(recorded, identity):
        return []
    return [
        f"{adapter.folder}: belongs to another base: it was trained on {recorded['path']}, and {identity['path']} "
        "has a different config.json or different weights"
    ]
