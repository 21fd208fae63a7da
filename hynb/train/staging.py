"""The pieces in which weights pass between files and devices, and the memory through which they pass."""

from __future__ import annotations

import threading

import torch

# Large enough for the rate of a disk, small enough for a progress report several times per second.
PIECE_BYTES = 32 << 20


class Staging:
    """A buffer of one piece for each thread, for values on their way to another dtype or device."""

    def __init__(self) -> None:
        self._buffers = threading.local()

    def bytes(self, count: int, *, pinned: bool) -> torch.Tensor:
        """The beginning of this thread's buffer, of dtype uint8; its content is valid until the next call.

        Args:
            count: at most PIECE_BYTES.
            pinned: in memory from and into which a GPU copies faster; decided by the first call of a thread.
        """
        if not hasattr(self._buffers, "piece"):
            self._buffers.piece = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=pinned)
        return self._buffers.piece[:count]
