"""What a merge will change: each adapter key matched to a tensor of the base, or refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hynb.errors import MergeError
from hynb.files import read_json
from hynb.merge import shards
from hynb.merge.shards import Shard, TensorEntry
from hynb.runs import BASE_IDENTITY, base_identity

_PREFIX = "base_model.model."
_HEAD, _EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
_KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?$"
)
_PAIRS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}
# Settings of an adapter that change the arithmetic in a way that is not done here.
_UNKNOWN_SETTINGS = {
    "lora_bias": "a bias on lora_B",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "trainable_token_indices": "trained single tokens",
    "ensure_weight_tying": "adapters that are tied to each other",
}


@dataclass(kw_only=True, frozen=True)
class Change:
    """One adapter's part in one tensor.

    factor: alpha / rank (or / sqrt(rank)) times the adapter's weight.
    replacement: a whole new tensor instead (modules_to_save, bias).
    expert: number of the expert and of all experts, where one pair of matrices serves a fused parameter.
    rows: the tensor's rows in that parameter.
    """

    adapter: Path
    factor: float = 0.0
    down: str | None = None
    up: str | None = None
    magnitude: str | None = None
    embedding: bool = False
    transposed: bool = False
    replacement: str | None = None
    expert: tuple[int, int] | None = None
    rows: tuple[int, int] | None = None


@dataclass(kw_only=True)
class MergePlan:
    """Everything that a merge needs to know before it writes.

    untied: an output layer that gets a tensor of its own, because an adapter changes it or the embeddings that the
        base has it tied to; the entry's bytes are the embeddings'. PEFT's own merge would change both at once,
        and answer otherwise than base and adapter do.
    """

    base: Path
    shards: list[Shard]
    changes: dict[str, list[Change]]
    base_identity: dict[str, Any]
    adapter_identities: list[dict[str, Any]]
    untied: TensorEntry | None = None

    @property
    def fingerprint(self) -> str:
        """Tells whether a broken-off merge had the same inputs."""
        inputs = {"base": self.base_identity, "adapters": self.adapter_identities}
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def plan_merge(
    base: Path,
    adapters: Sequence[Path],
    weights: Sequence[float] | None = None,
    *,
    original: Path | None = None,
) -> MergePlan:
    """Matches every key of every adapter to a tensor of the base.

    Args:
        original: the folder that `base` was converted from, which is what an adapter belongs to.

    Raises:
        MergeError: all that cannot be merged, by name.
        ModelError: a base folder that is incomplete or corrupt.
    """
    weights = list(weights or [1.0] * len(adapters))
    if len(weights) != len(adapters):
        raise MergeError(f"adapter_weights: {len(weights)} factors for {len(adapters)} adapters; give one for each")
    model_config = _base_config(base)
    found = shards.model_shards(base)
    tensors = {entry.name: entry for entry in shards.entries(found)}
    untied = None
    if model_config.get("tie_word_embeddings") and _HEAD not in tensors and _EMBEDDINGS in tensors:
        # Adapted apart from each other, the two can be tied no more.
        untied = tensors[_HEAD] = dataclasses.replace(tensors[_EMBEDDINGS], name=_HEAD)
    changes: dict[str, list[Change]] = {}
    problems: list[str] = []
    identity = base_identity(original or base)
    identities = []
    for folder, weight in zip(adapters, weights, strict=True):
        folder = folder.expanduser().absolute()
        weights_file, settings = _open_adapter(folder)
        problems += _unmergeable(folder, settings, identity)
        problems += _match(weights_file, settings, weight, tensors, changes)
        digest = hashlib.sha256(weights_file.read_bytes()).hexdigest()
        size_bytes = weights_file.stat().st_size
        identities.append({"path": str(folder), "sha256": digest, "bytes": size_bytes, "weight": weight})
    if problems:
        raise MergeError(problems)
    return MergePlan(
        base=base,
        shards=found,
        changes=changes,
        base_identity=identity,
        adapter_identities=identities,
        untied=untied if {_HEAD, _EMBEDDINGS} & changes.keys() else None,
    )


def changed_tensor(tensor: torch.Tensor, changes: Sequence[Change]) -> torch.Tensor:
    """A tensor with its changes applied one after the other.

    Args:
        tensor: float32, as it is in the base; not written to.
    """
    for change in changes:
        with safe_open(_weights_of(change.adapter), framework="pt") as adapter:

            def part(name: str, adapter: Any = adapter) -> torch.Tensor:
                return adapter.get_tensor(name).float()

            if change.replacement:
                tensor = part(change.replacement)
                continue
            down, up = part(change.down), part(change.up)
            if change.expert:
                # PEFT keeps a fused parameter's pair as (experts × rank) × in, and out × (rank × experts).
                index, count = change.expert
                down = down.view(count, -1, down.shape[-1])[index]
                up = up.view(up.shape[0], -1, count)[slice(*change.rows), :, index]
            delta = (up @ down).mul_(change.factor)
            if change.embedding or change.transposed:
                delta = delta.T
            tensor = tensor + delta
            if change.magnitude:
                axis = 0 if change.transposed else 1
                norm = torch.linalg.norm(tensor, dim=axis, keepdim=True)
                tensor = tensor * (part(change.magnitude).view_as(norm) / norm)
    return tensor


def _base_config(base: Path) -> dict[str, Any]:
    if not base.is_dir():
        raise MergeError(f"base_model_path = {base}: there is no such folder")
    model_config = read_json(base / "config.json")
    if model_config is None:
        raise MergeError(f"base_model_path = {base}: has no config.json, so it is no model folder")
    if "quantization_config" in model_config:
        raise MergeError(f"base_model_path = {base}: is quantised; merge into the bf16 or fp16 original")
    return model_config


def _weights_of(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def _open_adapter(folder: Path) -> tuple[Path, dict[str, Any]]:
    settings = read_json(folder / "adapter_config.json") if folder.is_dir() else None
    if settings is None:
        inside = sorted(folder.glob("checkpoint-*")) if folder.is_dir() else []
        hint = f"; a run's adapter is in its checkpoint, such as {inside[-1]}" if inside else ""
        raise MergeError(f"adapter_model_path = {folder}: is no adapter folder (no adapter_config.json){hint}")
    if not _weights_of(folder).is_file():
        raise MergeError(f"{folder}: has no adapter_model.safetensors; save the adapter as safetensors first")
    shards.read_shard(_weights_of(folder))
    return _weights_of(folder), settings


def _unmergeable(folder: Path, settings: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    problems = []
    kind = settings.get("peft_type")
    if kind != "LORA":
        return [f"{folder}: is an adapter of type {kind}; hynb merges LORA (with DoRA and rsLoRA)"]
    for name, words in _UNKNOWN_SETTINGS.items():
        if settings.get(name):
            problems.append(f"{folder}: adapter_config.json has {name} = {settings[name]}: {words} can't be merged")
    recorded = read_json(folder / BASE_IDENTITY)
    if recorded and recorded["hash"] != identity["hash"]:
        problems.append(
            f"{folder}: belongs to another base: it was trained on {recorded['path']}, and {identity['path']} "
            "has another config or other weights"
        )
    return problems


def _match(
    weights_file: Path,
    settings: dict[str, Any],
    weight: float,
    tensors: dict[str, TensorEntry],
    changes: dict[str, list[Change]],
) -> list[str]:
    """Files a Change for each tensor that the adapter's keys name; returns what cannot be matched."""
    shapes = {entry.name: entry.shape for entry in shards.read_shard(weights_file).tensors}
    folder, problems, used = weights_file.parent, [], set()
    transposed = bool(settings.get("fan_in_fan_out"))
    # Whole tensors first: an adapter on embeddings brings the embeddings that it is to be added to.
    for key, shape in sorted(shapes.items(), key=lambda item: _KEY.fullmatch(item[0]) is not None):
        if key in used:
            continue
        if not key.startswith(_PREFIX):
            problems.append(f"{weights_file}: key {key} doesn't begin with {_PREFIX}: it can't be placed")
            continue
        match = _KEY.fullmatch(key)
        if match is None:
            name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
            problems += _replacement(weights_file, key, name, shape, tensors, changes)
            continue
        module, part = match["module"].removeprefix(_PREFIX), match["part"]
        if part not in _PAIRS:
            continue
        partner = key.replace(f".{part}", f".{_PAIRS[part]}")
        if partner not in shapes:
            problems.append(f"{weights_file}: {key} has no {_PAIRS[part]} beside it")
            continue
        experts = _expert_tensors(module, tensors)
        if experts:
            problems += _match_experts(weights_file, settings, weight, key, partner, shapes, experts, changes)
            used |= {key, partner}
            continue
        name = f"{module}.weight"
        entry = tensors.get(name)
        if entry is None:
            problems.append(_absent(weights_file, key, name))
            continue
        rank = shape[0]
        magnitude = next((k for k in shapes if k.startswith(f"{_PREFIX}{module}.lora_magnitude_vector")), None)
        change = Change(
            adapter=folder,
            factor=_factor(settings, module, rank) * weight,
            down=key,
            up=partner,
            magnitude=magnitude,
            embedding=part == "lora_embedding_A",
            transposed=transposed,
        )
        made = (shapes[partner][0], shape[1])
        if change.embedding or change.transposed:
            made = made[::-1]
        if made != entry.shape or shapes[partner][1] != rank:
            problems.append(f"{weights_file}: {key} is for a weight of shape {made}, {name} has {entry.shape}")
        used |= {key, partner, magnitude}
        changes.setdefault(name, []).append(change)
    stray = [key for key in shapes if (m := _KEY.fullmatch(key)) and m["part"] not in _PAIRS and key not in used]
    return problems + [f"{weights_file}: {key} belongs to no lora_A: it would be left unused" for key in stray]


def _expert_tensors(module: str, tensors: dict[str, TensorEntry]) -> dict[str, list[TensorEntry]]:
    """The per-expert tensors that a fused expert module has on the disk, by projection; empty for other modules."""
    prefix = module.removesuffix(".base_layer")
    if not prefix.endswith(".experts") or f"{prefix}.0.down_proj.weight" not in tensors:
        return {}
    found: dict[str, list[TensorEntry]] = {}
    for projection in ("gate_proj", "up_proj", "down_proj"):
        names = (f"{prefix}.{index}.{projection}.weight" for index in range(len(tensors)))
        found[projection] = list(itertools.takewhile(bool, map(tensors.get, names)))
    return found


def _match_experts(
    weights_file: Path,
    settings: dict[str, Any],
    weight: float,
    key: str,
    partner: str,
    shapes: dict[str, tuple[int, ...]],
    experts: dict[str, list[TensorEntry]],
    changes: dict[str, list[Change]],
) -> list[str]:
    """Files the changes of an adapter on a fused parameter (PEFT's target_parameters), known by its shape."""
    (inner, width), count = experts["gate_proj"][0].shape, len(experts["gate_proj"])
    made = (shapes[partner][0], shapes[key][1])
    if (
        shapes[key][0] % count
        or shapes[partner][1] != shapes[key][0]
        or made not in ((2 * inner, width), (width, inner))
    ):
        return [
            f"{weights_file}: {key} is for a parameter of shape {made}, the base has {count} experts with "
            f"{(2 * inner, width)} and {(width, inner)}"
        ]
    fused = made == (2 * inner, width)
    module = _KEY.fullmatch(key)["module"].removeprefix(_PREFIX).removesuffix(".base_layer")
    name = f"{module}.{'gate_up_proj' if fused else 'down_proj'}"
    factor = _factor(settings, name, shapes[key][0] // count) * weight
    rows = {"gate_proj": (0, inner), "up_proj": (inner, 2 * inner)} if fused else {"down_proj": (0, width)}
    for projection, place in rows.items():
        for index, entry in enumerate(experts[projection]):
            change = Change(
                adapter=weights_file.parent, factor=factor, down=key, up=partner, expert=(index, count), rows=place
            )
            changes.setdefault(entry.name, []).append(change)
    return []


def _replacement(
    weights_file: Path,
    key: str,
    name: str,
    shape: tuple[int, ...],
    tensors: dict[str, TensorEntry],
    changes: dict[str, list[Change]],
) -> list[str]:
    entry = tensors.get(name)
    if entry is None:
        return [_absent(weights_file, key, name)]
    if entry.shape != shape:
        return [f"{weights_file}: {key} has shape {shape}, the base's {name} has {entry.shape}"]
    changes.setdefault(name, []).append(Change(adapter=weights_file.parent, replacement=key))
    return []


def _absent(weights_file: Path, key: str, name: str) -> str:
    return f"{weights_file}: {key} finds no tensor {name} in the base: is it an adapter for another model?"


def _factor(settings: dict[str, Any], module: str, rank: int) -> float:
    """alpha / rank with PEFT's patterns, which match the end of a module's name."""
    alpha = settings.get("lora_alpha") or rank
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
