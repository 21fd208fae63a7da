"""What an adapter changes in one tensor of the base, and the arithmetic of it."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from hynb.errors import MergeError
from hynb.merge.shards import TensorEntry, read_shard
from hynb.merge.tensors import TORCH_DTYPES, read_tensor

# Changes a block of a weight in place, given its values, its first row and column, and a tensor of its shape for the
# difference. Returns the factor between that tensor and the difference, or None if it left none there.
ChangeBlock = Callable[[torch.Tensor, int, int, torch.Tensor], "float | None"]

# File, key, and index and number of the parts of its rows.
_FactorName = tuple[Path, str, tuple[int, int]]


class ReadTensor(Protocol):
    """Returns a tensor of a weight file of the adapter in float32, as `Factors.read` does."""

    def __call__(
        self,
        file: Path,
        key: str,
        arrange: Callable[[torch.Tensor], torch.Tensor] = ...,
        /,
        *,
        part: tuple[int, int] = ...,
    ) -> torch.Tensor:
        """The tensor of a key."""
        ...


class Factors:
    """Tensors of adapters in float32, each read and arranged once while it is in use; for several threads.

    Args:
        most_bytes: the oldest are dropped beyond this.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[_FactorName, Future[torch.Tensor]] = OrderedDict()
        self._bytes = 0
        self._headers: dict[Path, dict[str, TensorEntry]] = {}
        self._lock = threading.Lock()

    def read(
        self,
        file: Path,
        key: str,
        arrange: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
        /,
        *,
        part: tuple[int, int] = (0, 1),
    ) -> torch.Tensor:
        """A tensor of a weight file; a key is always arranged in the same way.

        Args:
            part: index and number of the equal parts of its rows, of which one is read.
        """
        name = (file, key, part)
        with self._lock:
            kept = self._kept.get(name)
            missing = kept is None
            if kept is None:
                kept = self._kept[name] = Future()
            self._kept.move_to_end(name)
        if missing:
            # Without the lock, so that other threads can go on with other factors.
            try:
                tensor = arrange(self._read(file, key, part)).contiguous()
            except BaseException as error:
                kept.set_exception(error)
            else:
                self._keep(name, kept, tensor)
        return kept.result()

    def _keep(self, name: _FactorName, kept: Future[torch.Tensor], tensor: torch.Tensor) -> None:
        """Hands a tensor to those who wait for it, and drops the oldest ones."""
        with self._lock:
            kept.set_result(tensor)
            if self._kept.get(name) is kept:
                self._bytes += tensor.nbytes
            while len(self._kept) > 1 and self._bytes > self._most_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= oldest.result().nbytes if oldest.done() else 0

    def _read(self, file: Path, key: str, part: tuple[int, int]) -> torch.Tensor:
        entry = self._entry(file, key)
        if entry.dtype not in TORCH_DTYPES:
            raise MergeError(f"{file}: {key} has dtype {entry.dtype}; save the adapter in bf16, fp16 or fp32")
        size_bytes, begin = entry.size_bytes // part[1], entry.begin + part[0] * (entry.size_bytes // part[1])
        shape = (entry.shape[0] // part[1], *entry.shape[1:])
        return read_tensor(dataclasses.replace(entry, shape=shape, begin=begin, end=begin + size_bytes)).float()

    def _entry(self, file: Path, key: str) -> TensorEntry:
        """Reads each header once: that of an adapter on single experts has a hundred thousand keys."""
        with self._lock:
            if file not in self._headers:
                self._headers[file] = {entry.name: entry for entry in read_shard(file).tensors}
            return self._headers[file][key]


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

    @property
    def source(self) -> tuple[Path, str]:
        """What is read for it: file and key of the larger factor."""
        return self.weights_file, self.up

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

    def by_blocks(self, read: ReadTensor) -> ChangeBlock:
        """The change of any block of the weight."""
        return partial(
            _add_product, read(self.weights_file, self.up), read(self.weights_file, self.down), self.factor
        )


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

    by_rows = True

    @property
    def source(self) -> tuple[Path, str]:
        """What is read for it: file and key of the factor of all experts."""
        return self.weights_file, self.up

    def apply(self, tensor: torch.Tensor, read: ReadTensor) -> torch.Tensor:
        """The changed weight."""
        tensor = tensor.clone()
        self.by_blocks(read)(tensor, 0, 0, torch.empty_like(tensor))
        return tensor

    def by_blocks(self, read: ReadTensor) -> ChangeBlock:
        """The change of any block of the weight."""
        # One expert's part of A is a range of its rows; that of B is spread over the whole of it.
        down = read(self.weights_file, self.down, part=(self.expert, self.experts))
        up = read(self.weights_file, self.up, partial(_experts_first, self.experts))
        return partial(_add_product, up[self.expert, slice(*self.rows)], down, self.factor)


@dataclass(kw_only=True, frozen=True)
class Replacement:
    """Replaces a tensor by one that was trained whole (PEFT's `modules_to_save`, or a bias).

    Args:
        weights_file: the adapter's weight file.
        key: key of the tensor in it.
    """

    weights_file: Path
    key: str

    by_rows = True

    @property
    def source(self) -> tuple[Path, str]:
        """What is read for it: file and key of the tensor."""
        return self.weights_file, self.key

    def apply(self, tensor: torch.Tensor, read: ReadTensor) -> torch.Tensor:
        """The tensor of the adapter."""
        return read(self.weights_file, self.key)

    def by_blocks(self, read: ReadTensor) -> ChangeBlock:
        """The change of any block of the weight."""
        return partial(_replace, read(self.weights_file, self.key))


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


def _add_product(
    up: torch.Tensor,
    down: torch.Tensor,
    factor: float,
    values: torch.Tensor,
    top: int,
    left: int,
    difference: torch.Tensor,
) -> float:
    """Rounds as PEFT does: the product, its multiple, then the sum."""
    height, width = values.shape
    torch.mm(up[top : top + height], down[:, left : left + width], out=difference)
    if math.frexp(factor)[0] in (0.5, -0.5):
        # A power of two scales without rounding, so that one pass over the block is enough.
        values.add_(difference, alpha=factor)
        return abs(factor)
    values.add_(difference.mul_(factor))
    return 1.0


def _replace(tensor: torch.Tensor, values: torch.Tensor, top: int, left: int, difference: torch.Tensor) -> None:
    values.copy_(tensor[top : top + len(values), left : left + values.shape[1]])


def _experts_first(experts: int, tensor: torch.Tensor) -> torch.Tensor:
    """PEFT's out × (rank × experts) as experts × out × rank."""
    # A transposed matrix is copied in blocks that stay in the cache; three permuted dimensions are not.
    return tensor.view(-1, experts).t().contiguous().view(experts, len(tensor), -1)
