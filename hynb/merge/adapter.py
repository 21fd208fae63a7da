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

_WEIGHTS_NAME = "adapter_model.safetensors"
# PEFT settings that change the arithmetic in ways that a merge does not implement.
_UNSUPPORTED_SETTINGS = {
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
        return [
            f"{self.folder}: adapter_config.json has {name} = {self.settings[name]}: {meaning} cannot be merged"
            for name, meaning in _UNSUPPORTED_SETTINGS.items()
            if self.settings.get(name)
        ]


def open_adapter(folder: Path, weight: float) -> Adapter:
    """Reads the settings and the header of the weight file of an adapter.

    Raises:
        MergeError: the folder is not an adapter's, or its weights are not saved as safetensors.
        ModelError: the weight file is truncated or corrupt.
    """
    settings = read_json(folder / "adapter_config.json") if folder.is_dir() else None
    if settings is None:
        inside = sorted(folder.glob("checkpoint-*")) if folder.is_dir() else []
        hint = f"; the adapter of a run is in one of its checkpoints, such as {inside[-1]}" if inside else ""
        raise MergeError(f"adapter_model_path = {folder}: not an adapter folder (no adapter_config.json){hint}")
    path = folder / _WEIGHTS_NAME
    if not path.is_file():
        raise MergeError(f"{folder}: has no {_WEIGHTS_NAME}; save the adapter as safetensors first")
    shapes = {entry.name: entry.shape for entry in shards.read_shard(path).tensors}
    return Adapter(folder=folder, settings=settings, shapes=shapes, weight=weight)
