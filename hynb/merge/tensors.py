"""Tensors as bytes of safetensors files, and back."""

from __future__ import annotations

import threading

import torch

from hynb.merge import shards
from hynb.merge.shards import TensorEntry

# The dtypes that a merge computes with; tensors of any other dtype are only copied.
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """A tensor of a weight file, in its own dtype and shape."""
    return torch.frombuffer(shards.read_bytes(entry), dtype=TORCH_DTYPES[entry.dtype]).view(entry.shape)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The data of a tensor as it is stored in a weight file, without a copy if the tensor is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def same_bytes(one: memoryview, other: memoryview) -> bool:
    """Whether two ranges of memory are equal; other threads go on meanwhile, unlike with ==."""
    pair = [torch.frombuffer(data, dtype=torch.uint8) for data in (one, other) if data.nbytes]
    if len(one) != len(other) or len(pair) < 2:
        return len(one) == len(other)
    # Eight bytes at a time, six times as fast as single ones.
    whole = len(one) // 8 * 8
    return torch.equal(*(tensor[:whole].view(torch.int64) for tensor in pair)) and torch.equal(
        *(tensor[whole:] for tensor in pair)
    )


class Buffers(threading.local):
    """Memory that each thread uses again: new memory would have to be cleared by the system first."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}
        self._matrices: dict[tuple[str, torch.Size], torch.Tensor] = {}

    def get(self, name: str, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """A vector with any content; a name's next vector is in the same memory."""
        kept = self._kept.get(name)
        if kept is None or kept.dtype != dtype or kept.numel() < elements:
            kept = self._kept[name] = torch.empty(elements, dtype=dtype)
        return kept[:elements]

    def matrix(self, name: str, shape: torch.Size) -> torch.Tensor:
        """A float32 matrix with any content, as by `get`; those of the last shapes are kept, which saves time."""
        kept = self._matrices.get((name, shape))
        if kept is None:
            if len(self._matrices) > 16:
                self._matrices.clear()
            kept = self._matrices[name, shape] = self.get(name, shape.numel(), torch.float32).view(shape)
        return kept
