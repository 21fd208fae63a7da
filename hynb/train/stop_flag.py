"""A stop request, seen by rank 0 and followed by all ranks at the same step."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist

# A look at a network disk may take milliseconds.
_LOOK_SECONDS = 0.5


class StopFlag:
    """Rank 0 looks for a file; all ranks learn of it one step later, for which none of them waits.

    The flag travels between CPUs, beside the GPUs' own messages. Every rank creates one at the same point.

    Args:
        request: the file.
    """

    def __init__(self, request: Path) -> None:
        self._request = request
        self._looked_at = -_LOOK_SECONDS
        self._requested = False
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if several else None
        self._under_way: tuple[dist.Work, torch.Tensor] | None = None

    def is_set(self) -> bool:
        """Whether all ranks are to stop now; called by every rank once per step."""
        if self._group is None:
            return self._look()
        stop = self.finish()
        if not stop:
            flag = torch.tensor([float(dist.get_rank() == 0 and self._look())])
            work = dist.all_reduce(flag, group=self._group, async_op=True)
            assert work is not None
            self._under_way = work, flag
        return stop

    def finish(self) -> bool:
        """Waits for the message that is under way; whether it said to stop."""
        if self._under_way is None:
            return False
        work, flag = self._under_way
        self._under_way = None
        work.wait()
        return bool(flag.item())

    def _look(self) -> bool:
        now = time.monotonic()
        if not self._requested and now - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = now
            self._requested = self._request.exists()
        return self._requested
