"""Loading whole weights in transformers' own way, with the bytes that have been read."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers.core_model_loading
import transformers.modeling_utils

from hynb.merge import DTYPE_BYTES, TensorEntry
from hynb.train.byte_progress import ByteProgress
from hynb.train.stored_tensors import stored_parts

# transformers 5.23: loads all tensors of safetensors files, and one tensor of them.
_LOADER, _READER = "convert_and_load_state_dict_in_model", "_materialize_copy"


@contextmanager
def counted_reads(stored: Sequence[TensorEntry], progress: ByteProgress) -> Iterator[None]:
    """While it is active, `from_pretrained` reports the bytes that it reads from safetensors files.

    Args:
        stored: the tensors of the base; empty where they are in other files, whose bytes are not counted.
        progress: called with the bytes that this rank has read, and those that it reads in all.
    """
    if not stored:
        yield
        return
    plain_load = getattr(transformers.modeling_utils, _LOADER)
    plain_read = getattr(transformers.core_model_loading, _READER)

    def load(model: Any, state_dict: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        total_bytes = _loaded_bytes(model, stored, load_config.weight_mapping)
        done_bytes, lock = 0, threading.Lock()

        def read(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal done_bytes
            result = plain_read(tensor, *args, **kwargs)
            with lock:
                done_bytes += _stored_bytes(tensor)
                progress(done_bytes, total_bytes)
            return result

        with replaced(transformers.core_model_loading, _READER, read):
            result = plain_load(model, state_dict, load_config, *args, **kwargs)
        progress.end(total_bytes)
        return result

    with replaced(transformers.modeling_utils, _LOADER, load):
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Gives an attribute of a library another value for a while."""
    plain = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, plain)


def _stored_bytes(tensor: Any) -> int:
    """Bytes of a tensor, or of a slice of a file, of which transformers reads all."""
    if isinstance(tensor, torch.Tensor):
        return tensor.nbytes
    return math.prod(tensor.get_shape()) * DTYPE_BYTES[tensor.get_dtype()]


def _loaded_bytes(model: Any, stored: Sequence[TensorEntry], conversions: Sequence[Any] | None) -> int:
    """Bytes of the tensors that a model has; MTP layers, for one, are left out."""
    parts = stored_parts(model, {entry.name: entry.shape for entry in stored}, conversions or [])
    if parts is None:
        return sum(entry.size_bytes for entry in stored)
    used = {part.stored for pieces in parts.values() for part in pieces}
    return sum(entry.size_bytes for entry in stored if entry.name in used)
