"""LoRA adapter folders as PEFT saves them: settings, the shapes of their tensors, and what cannot be merged."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hynb.errors import MergeError
from hynb.files import file_hash, read_json
from hynb.merge import shards

_WEIGHTS_NAME, _SETTINGS_NAME = "adapter_model.safetensors", "adapter_config.json"
# In the names of DoRA's tensors.
_MAGNITUDE = "lora_magnitude_vector"
# Starts of an adapter for which PEFT takes a part out of the base's weights.
_CHANGING_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LARGEST = 1e18
# Settings that the merge computes with, by type; null counts as absent.
_TYPES: dict[str, tuple[str, type | tuple[type, ...]]] = {
    "peft_type": ("a string", str),
    "r": ("a number", (int, float)),
    "lora_alpha": ("a number", (int, float)),
    "rank_pattern": ("an object", dict),
    "alpha_pattern": ("an object", dict),
    "base_model_name_or_path": ("a string", str),
}
# PEFT settings that change the arithmetic in ways that a merge does not implement.
_UNSUPPORTED_SETTINGS = {
    "use_qalora": "QA-LoRA, whose adapters take grouped inputs,",
    "lora_bias": "a bias on lora_B",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "trainable_token_indices": "single trained tokens",
    "ensure_weight_tying": "adapters tied to each other",
}


@dataclass(kw_only=True, frozen=True)
class Adapter:
    """One adapter of a merge.

    Args:
        settings: the content of adapter_config.json.
        shapes: shape of each tensor of the weight file, by key.
        weight: factor by which this adapter's change is multiplied.
    """

    folder: Path
    settings: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    weight: float

    @property
    def weights_file(self) -> Path:
        """The safetensors file of the adapter."""
        return self.folder / _WEIGHTS_NAME

    def factor(self, module: str, rank: int) -> float:
        """alpha / rank of a module, or alpha / sqrt(rank) for rsLoRA, times the adapter's weight.

        PEFT's `alpha_pattern` applies to modules whose name ends with the pattern.
        """
        alpha = self.settings.get("lora_alpha") or rank
        for pattern, value in (self.settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        divisor = math.sqrt(rank) if self.settings.get("use_rslora") else rank
        return alpha / divisor * self.weight

    def identity(self) -> dict[str, Any]:
        """Path, sha256 and size in bytes of the weight file, and the weight in the merge."""
        path = self.weights_file
        sizes = {"sha256": file_hash(path), "bytes": path.stat().st_size}
        return {"path": str(self.folder)} | sizes | {"weight": self.weight}

    def problems(self) -> list[str]:
        """Settings that cannot be merged, as messages."""
        kind = self.settings.get("peft_type")
        if kind != "LORA":
            return [f"{self.folder}: the adapter is of type {kind}; hynb merges LORA (with DoRA and rsLoRA)"]
        path = self.folder / _SETTINGS_NAME
        problems = [
            f"{path}: has {name} = {self.settings[name]}: {meaning} cannot be merged; train the adapter without it"
            for name, meaning in _UNSUPPORTED_SETTINGS.items()
            if self.settings.get(name)
        ]
        start = self.settings.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGING_THE_BASE):
            problems.append(
                f"{path}: has init_lora_weights = {start}: that start changes the base's weights too, which the "
                "adapter does not hold. Save the adapter as a plain one first (PEFT's save_pretrained with "
                "path_initial_model_for_weight_conversion)"
            )
        if self.settings.get("use_dora") and not any(_MAGNITUDE in name for name in self.shapes):
            problems.append(
                f"{path}: has use_dora = true, but {_WEIGHTS_NAME} holds no magnitudes ({_MAGNITUDE}): its weights "
                "are of another adapter or incomplete; save the adapter again"
            )
        return problems


def open_adapter(folder: Path, weight: float) -> Adapter:
    """Reads the settings and the header of the weight file of an adapter.

    Raises:
        MergeError: the folder is not an adapter's, or its weights are not saved as safetensors.
        ModelError: the weight file is truncated or corrupt.
    """
    settings = read_json(folder / _SETTINGS_NAME) if folder.is_dir() else None
    if settings is None:
        inside = sorted(folder.glob("checkpoint-*")) if folder.is_dir() else []
        hint = f"; the adapter of a run is in one of its checkpoints, such as {inside[-1]}" if inside else ""
        raise MergeError(f"adapter_model_path = {folder}: not an adapter folder (no adapter_config.json){hint}")
    _check_types(folder / _SETTINGS_NAME, settings)
    path = folder / _WEIGHTS_NAME
    if not path.is_file():
        raise MergeError(f"{folder}: has no {_WEIGHTS_NAME}; save the adapter as safetensors first")
    shapes = {entry.name: entry.shape for entry in shards.read_shard(path).tensors}
    return Adapter(folder=folder, settings=settings, shapes=shapes, weight=weight)


def _is_a(value: Any, kinds: type | tuple[type, ...]) -> bool:
    is_small = not isinstance(value, (int, float)) or abs(value) < _LARGEST
    return isinstance(value, kinds) and not isinstance(value, bool) and is_small


def _check_types(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuses settings that nothing can be computed with.

    Raises:
        MergeError: a setting has the wrong type, or a pattern is not a regular expression.
    """
    problems = [
        f"{name} = {settings[name]!r}: must be {words}"
        for name, (words, kinds) in _TYPES.items()
        if settings.get(name) is not None and not _is_a(settings[name], kinds)
    ]
    patterns = settings.get("alpha_pattern") or {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            problems.append(f"alpha_pattern: {pattern!r} is not a regular expression ({error})")
        if not _is_a(value, (int, float)):
            problems.append(f"alpha_pattern of {pattern!r} = {value!r}: must be a number")
    if problems:
        raise MergeError([f"{path}: {problem}; restore the file" for problem in problems])
