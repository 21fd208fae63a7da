"""Number and dtype of a folder's weights, from the headers of its safetensors files."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hynb.errors import ModelError
from hynb.files import read_weight_map

# The limit of the safetensors library.
_MAX_HEADER_BYTES = 100 << 20


@dataclass(kw_only=True, frozen=True)
class Weights:
    """The weights of a folder.

    Args:
        files: number of safetensors files.
        size_bytes: of these files, or of pickled ones.
        parameters: by dtype as safetensors names it, such as BF16; empty for pickled files and without weights.
        missing: files that the index names and that are not there.
        kind: safetensors, pickled or none.
    """

    files: int
    size_bytes: int
    parameters: dict[str, int]
    missing: tuple[str, ...]
    kind: str


def read_weights(folder: Path) -> Weights:
    """Reads the headers alone, without torch.

    Raises:
        ModelError: a file is truncated or not a safetensors file.
    """
    shards = sorted(path for path in folder.glob("*.safetensors") if path.name != "adapter_model.safetensors")
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    counts: Counter[str] = Counter()
    for shard in shards:
        for dtype, shape in _header(shard):
            counts[dtype] += math.prod(shape)
    files = shards or pickled
    return Weights(
        files=len(files),
        size_bytes=sum(path.stat().st_size for path in files),
        parameters=dict(counts.most_common()),
        missing=_missing(folder),
        kind="safetensors" if shards else "pickled" if pickled else "none",
    )


def _header(shard: Path) -> list[tuple[str, list[int]]]:
    """Dtype and shape of each tensor."""
    try:
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            content = json.loads(file.read(length)) if length <= _MAX_HEADER_BYTES else None
        assert content is not None
        found = [(item["dtype"], item["shape"]) for name, item in content.items() if name != "__metadata__"]
        assert all(isinstance(dtype, str) and all(type(size) is int for size in shape) for dtype, shape in found)
        return found
    except (OSError, ValueError, AssertionError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(
            f"{shard}: is truncated or not a safetensors file. Download or copy the file again"
        ) from None


def _missing(folder: Path) -> tuple[str, ...]:
    names = set((read_weight_map(folder) or {}).values())
    return tuple(sorted(name for name in names if not (folder / name).is_file()))
