"""Tensors as bytes of safetensors files, and back."""

from __future__ import annotations

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
