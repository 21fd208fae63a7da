"""A stop request, seen by rank 0 and followed by all ranks at the same step."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist

from hynb.files import is_there

# A look at a network disk may take milliseconds, and a message between the ranks half a millisecond of each.
_LOOK_SECONDS = 0.5
# Between two messages: steps may become slower than they have been.
_MOST_STEPS = 10


class StopFlag:
    """Rank 0 looks for a file; all ranks learn of it one step later, for which none of them waits.

    Where steps are short it looks about twice per second; with each message it tells all ranks when the next one is
    due. The flag travels between CPUs, beside the GPUs' own messages. Every rank creates one at the same point.

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
        self._due_in = self._steps = 1
        self._sent_at: float | None = None

    def is_set(self) -> bool:
        """Whether all ranks are to stop now; called by every rank once per step."""
        if self._group is None:
            return self._look()
        stop = self.finish()
        self._due_in -= 1
        if not stop and self._due_in <= 0:
            self._send()
        return stop

    def finish(self) -> bool:
        """Waits for the message that is under way; whether it said to stop."""
        if self._under_way is None:
            return False
        work, message = self._under_way
        self._under_way = None
        work.wait()
        stop, self._steps = message.int().tolist()
        self._due_in = self._steps
        return bool(stop)

    def _send(self) -> None:
        """Rank 0's message: whether to stop, and the steps until the next one."""
        message = torch.zeros(2)
        if dist.get_rank() == 0:
            now, steps = time.monotonic(), 1
            if self._sent_at is not None:
                steps = int(_LOOK_SECONDS / max(1e-6, now - self._sent_at) * self._steps)
            self._sent_at = now
            message = torch.tensor([float(is_there(self._request)), float(min(max(1, steps), _MOST_STEPS))])
        work = dist.all_reduce(message, group=self._group, async_op=True)
        assert work is not None
        self._under_way = work, message

    def _look(self) -> bool:
        now = time.monotonic()
        if not self._requested and now - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = now
            self._requested = is_there(self._request)
        return self._requested
