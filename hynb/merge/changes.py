"""What an adapter changes in one tensor of the base, and the arithmetic of it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open


class ReadTensor(Protocol):
    """Returns a tensor of a weight file of the adapter in float32, arranged as the caller needs it."""

    def __call__(
        self, file: Path, key: str, arrange: Callable[[torch.Tensor], torch.Tensor] = ..., /
    ) -> torch.Tensor:
        """The tensor of a key."""
        ...


class Factors:
    """Tensors of adapters in float32, each read and arranged once while it is in use.

    Args:
        most_bytes: the oldest are dropped beyond this.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[tuple[Path, str], torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def read(
        self, file: Path, key: str, arrange: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor, /
    ) -> torch.Tensor:
        """A tensor of a weight file; a key is always arranged in the same way."""
        with self._lock:
            tensor = self._kept.get((file, key))
            if tensor is None:
                with safe_open(file, framework="pt") as opened:
                    tensor = arrange(opened.get_tensor(key).float()).contiguous()
                self._kept[file, key] = tensor
                while len(self._kept) > 1 and sum(item.nbytes for item in self._kept.values()) > self._most_bytes:
                    self._kept.popitem(last=False)
            self._kept.move_to_end((file, key))
            return tensor


@dataclass(kw_only=True, frozen=True)
class LowRankChange:
    """Adds a scaled product of two low-rank matrices to a weight (LoRA: arXiv 2106.09685).

    Args:
        weights_file: the adapter's weight file, which the keys refer to.
        down, up: keys of the matrices A (rank × in) and B (out × rank).
        factor: alpha / rank (rsLoRA, arXiv 2312.03732: alpha / sqrt(rank)) times the adapter's weight.
        magnitude: key of DoRA's magnitude vector (arXiv 2402.09353); None without DoRA.
        embedding: the weight is an embedding, stored as in × out.
        fan_in_fan_out: the weight is stored as in × out, which PEFT's setting of this name says.
    """

    weights_file: Path
    down: str
    up: str
    factor: float
    magnitude: str | None = None
    embedding: bool = False
    fan_in_fan_out: bool = False

    leaves_difference = True

    @property
    def by_rows(self) -> bool:
        """Whether rows of the weight can be changed apart from the others."""
        return not (self.embedding or self.fan_in_fan_out or self.magnitude)

    def apply(self, tensor: torch.Tensor, read: ReadTensor) -> torch.Tensor:
        """The changed weight."""
        delta = (read(self.weights_file, self.up) @ read(self.weights_file, self.down)).mul_(self.factor)
        tensor = tensor + (delta.T if self.embedding or self.fan_in_fan_out else delta)
        if self.magnitude is None:
            return tensor
        norm = torch.linalg.norm(tensor, dim=0 if self.fan_in_fan_out else 1, keepdim=True)
        return tensor * (read(self.weights_file, self.magnitude).view_as(norm) / norm)

    def apply_to_rows(self, values: torch.Tensor, read: ReadTensor, rows: slice, scratch: torch.Tensor) -> None:
        """Changes some rows of the weight in place.

        Args:
            scratch: a tensor of the same shape, into which the difference is written.
        """
        torch.mm(read(self.weights_file, self.up)[rows], read(self.weights_file, self.down), out=scratch)
        values.add_(scratch.mul_(self.factor))


@dataclass(kw_only=True, frozen=True)
class ExpertChange:
    """Adds one expert's part of a LoRA on a fused parameter of all experts (PEFT's `target_parameters`).

    Args:
        weights_file, down, up, factor: as in LowRankChange; the matrices hold all experts, A as
            (experts × rank) × in and B as out × (rank × experts), which is PEFT's layout.
        expert: index of the expert.
        experts: number of experts.
        rows: first and last + 1 row of the weight in the fused parameter.
    """

    weights_file: Path
    down: str
    up: str
    factor: float
    expert: int
    experts: int
    rows: tuple[int, int]

    by_rows = leaves_difference = True

    def apply(self, tensor: torch.Tensor, read: ReadTensor) -> torch.Tensor:
        """The changed weight."""
        tensor = tensor.clone()
        self.apply_to_rows(tensor, read, slice(None), torch.empty_like(tensor))
        return tensor

    def apply_to_rows(self, values: torch.Tensor, read: ReadTensor, rows: slice, scratch: torch.Tensor) -> None:
        """Changes some rows of the weight in place, as in LowRankChange."""
        down = read(self.weights_file, self.down, lambda all_: all_.view(self.experts, -1, all_.shape[-1]))
        # One expert's part of B is spread over the whole of it.
        up = read(self.weights_file, self.up, lambda all_: all_.view(len(all_), -1, self.experts).permute(2, 0, 1))
        torch.mm(up[self.expert, slice(*self.rows)][rows], down[self.expert], out=scratch)
        values.add_(scratch.mul_(self.factor))


@dataclass(kw_only=True, frozen=True)
class Replacement:
    """Replaces a tensor by one that was trained whole (PEFT's `modules_to_save`, or a bias).

    Args:
        weights_file: the adapter's weight file.
        key: key of the tensor in it.
    """

    weights_file: Path
    key: str

    by_rows, leaves_difference = True, False

    def apply(self, tensor: torch.Tensor, read: ReadTensor) -> torch.Tensor:
        """The tensor of the adapter."""
        return read(self.weights_file, self.key)

    def apply_to_rows(self, values: torch.Tensor, read: ReadTensor, rows: slice, scratch: torch.Tensor) -> None:
        """Replaces some rows in place; `scratch` stays as it is."""
        values.copy_(read(self.weights_file, self.key)[rows])


Change = LowRankChange | ExpertChange | Replacement


def changed_tensor(tensor: torch.Tensor, changes: Sequence[Change], read: ReadTensor) -> torch.Tensor:
    """A tensor of the base with its changes applied one after the other.

    Args:
        tensor: the base's values in float32; it is not written to.

    Returns:
        a float32 tensor of the same shape.
    """
    for change in changes:
        tensor = change.apply(tensor, read)
    return tensor
