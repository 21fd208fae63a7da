"""What an adapter changes in one tensor of the base, and the arithmetic of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

# Returns a tensor of the adapter's weight file, by its key, in float32.
ReadTensor = Callable[[str], torch.Tensor]


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

    def apply(self, tensor: torch.Tensor, read: ReadTensor) -> torch.Tensor:
        """The changed weight."""
        delta = (read(self.up) @ read(self.down)).mul_(self.factor)
        tensor = tensor + (delta.T if self.embedding or self.fan_in_fan_out else delta)
        if self.magnitude is None:
            return tensor
        norm = torch.linalg.norm(tensor, dim=0 if self.fan_in_fan_out else 1, keepdim=True)
        return tensor * (read(self.magnitude).view_as(norm) / norm)


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

    def apply(self, tensor: torch.Tensor, read: ReadTensor) -> torch.Tensor:
        """The changed weight."""
        down, up = read(self.down), read(self.up)
        down = down.view(self.experts, -1, down.shape[-1])[self.expert]
        up = up.view(up.shape[0], -1, self.experts)[slice(*self.rows), :, self.expert]
        return tensor + (up @ down).mul_(self.factor)


@dataclass(kw_only=True, frozen=True)
class Replacement:
    """Replaces a tensor by one that was trained whole (PEFT's `modules_to_save`, or a bias).

    Args:
        weights_file: the adapter's weight file.
        key: key of the tensor in it.
    """

    weights_file: Path
    key: str

    def apply(self, tensor: torch.Tensor, read: ReadTensor) -> torch.Tensor:
        """The tensor of the adapter."""
        return read(self.key)


Change = LowRankChange | ExpertChange | Replacement


def changed_tensor(tensor: torch.Tensor, changes: Sequence[Change]) -> torch.Tensor:
    """A tensor of the base with its changes applied one after the other.

    Args:
        tensor: the base's values in float32; it is not written to.

    Returns:
        a float32 tensor of the same shape.
    """
    for change in changes:
        with safe_open(change.weights_file, framework="pt") as file:
            tensor = change.apply(tensor, lambda key, file=file: file.get_tensor(key).float())
    return tensor
