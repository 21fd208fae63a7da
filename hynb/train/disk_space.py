"""The space that a checkpoint needs, and what is free where it is to be written."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.integration_utils import TensorBoardCallback

from hynb.errors import RunError
from hynb.files import is_full, size_text
from hynb.train.gathering import of_all_ranks
from hynb.train.model import count_parameters
from hynb.train.saving import SavedShard

# Headers, padding, the states of random generators, and the files of the tokenizer.
_MARGIN_SHARE, _MARGIN_BYTES = 1.02, 32_000_000
_RETRY_SECONDS = 60.0


@dataclass(kw_only=True, frozen=True)
class Shortage:
    """A checkpoint that does not fit.

    Args:
        needed, free: bytes.
    """

    host: str
    needed: int
    free: int

    def __str__(self) -> str:
        return (
            f"a checkpoint takes about {size_text(self.needed)} and the disk on {self.host} has "
            f"{size_text(self.free)} free"
        )


def checkpoint_bytes(model: torch.nn.Module, shards: Sequence[SavedShard]) -> int:
    """About the size of a checkpoint.

    Args:
        shards: the weight files of a full checkpoint; empty for an adapter, whose weights are those that are trained.
    """
    # The optimizer keeps a float32 weight and two moments of each trained parameter (arXiv 1910.02054), and under
    # ZeRO-1 and 2 DeepSpeed's own checkpoint holds the trained weights a second time.
    trained = count_parameters(model)["trainable_parameters"]
    return weight_bytes(model, shards) + trained * (12 + _item_bytes(model))


def weight_bytes(model: torch.nn.Module, shards: Sequence[SavedShard]) -> int:
    """The size of a checkpoint's weights alone, as they are saved without the optimizer's states."""
    saved_bytes = sum(tensor.size_bytes for shard in shards for tensor in shard.tensors)
    return saved_bytes or count_parameters(model)["trainable_parameters"] * _item_bytes(model)


def _item_bytes(model: torch.nn.Module) -> int:
    return max((weight.element_size() for weight in model.parameters() if weight.requires_grad), default=0)


def shortage(output_dir: Path, needed: int) -> Shortage | None:
    """What is missing on this rank's disk; None if the checkpoint fits.

    Args:
        needed: bytes of a checkpoint.
    """
    free = shutil.disk_usage(output_dir).free
    return Shortage(host=socket.gethostname(), needed=needed, free=free) if needed > free else None


def shortage_anywhere(output_dir: Path, needed: int, *, looks: bool) -> Shortage | None:
    """The first shortage of all ranks, the same on each; every rank calls it.

    Args:
        needed: bytes of a checkpoint.
        looks: whether this rank is the first that sees its folder.
    """
    needed = round(_MARGIN_SHARE * needed) + _MARGIN_BYTES
    found = of_all_ranks(shortage(output_dir, needed) if looks else None)
    return next((one for one in found if one is not None), None)


class LastingTensorBoard(TensorBoardCallback):
    """TensorBoard's events; where they do not fit on the disk they are left out, since events.jsonl has them too."""

    def __init__(self) -> None:
        super().__init__()
        self._failed_at = -_RETRY_SECONDS

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Writes the arguments."""
        self._try(super().on_train_begin, *args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Writes the numbers of a log step."""
        self._try(super().on_log, *args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Closes the file."""
        self._try(super().on_train_end, *args, **kwargs)

    def _try(self, write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if time.monotonic() - self._failed_at < _RETRY_SECONDS:
            return
        try:
            write(*args, **kwargs)
        except OSError as error:
            if not is_full(error):
                raise
            # Its thread has ended with the error; a new file is begun later, not with each log step.
            self.tb_writer, self._failed_at = None, time.monotonic()


def check_disk(output_dir: Path, needed: int) -> None:
    """Checks that one checkpoint fits on the disk.

    Args:
        needed: bytes of a checkpoint.

    Raises:
        RunError: it does not; with the bytes needed and free.
    """
    if short := shortage(output_dir, needed):
        raise RunError(f"output_dir = {output_dir}: {short}. Free some space, or choose another output_dir")
