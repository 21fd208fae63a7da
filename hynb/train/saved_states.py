"""Reading DeepSpeed's states of a checkpoint without running what is in them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from hynb.errors import RunError
from hynb.train.library_loading import replaced

# All classes that DeepSpeed's states hold beside tensors and plain values (0.19.8).
_CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def load_states(path: Path, *, trusted: bool = False, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """What torch.save has written, unpickled with the classes of DeepSpeed's states alone.

    Args:
        trusted: unpickle whatever is in it.
        map_location: as of torch.load.
        mmap: map the file instead of reading it.

    Raises:
        RunError: it holds other objects, which may run code, or is not such a file.
    """
    options: dict[str, Any] = {"map_location": map_location, "mmap": mmap}
    if trusted:
        return torch.load(path, weights_only=False, **options)
    try:
        with torch.serialization.safe_globals(_CLASSES):
            return torch.load(path, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "") or str(error)
        raise RunError(
            f"{path}: holds objects that DeepSpeed's states do not have, and which may run code when they are loaded "
            f"({reason[:200]}). If you know where the checkpoint comes from, set trust_checkpoint: true"
        ) from None


@contextmanager
def restricted_unpickling(*, trusted: bool) -> Iterator[None]:
    """Within it DeepSpeed reads its states in the same way.

    Args:
        trusted: it unpickles whatever is in them.
    """

    def load(_: TorchCheckpointEngine, path: str, map_location: Any = None) -> dict[str, Any]:
        return load_states(Path(path), trusted=trusted, map_location=map_location)

    with replaced(TorchCheckpointEngine, "load", load):
        yield
