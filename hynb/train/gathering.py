"""What each rank has or is ready for, known to all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def of_all_ranks(value: Any) -> list[Any]:
    """The values of all ranks, by rank; every rank calls it, and one process alone has its own."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class Readiness:
    """Whether every rank is ready; all learn it at the same step, and none of them waits for that.

    The question travels between CPUs, beside the GPUs' own messages, and is answered one step later. Every rank
    creates one at the same point.
    """

    def __init__(self) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if several else None
        self._under_way: tuple[dist.Work, torch.Tensor] | None = None

    def of_all(self, mine: bool) -> bool:
        """Whether all ranks were ready at the last call; every rank calls it once per step."""
        if self._group is None:
            return mine
        if self.settle():
            return True
        message = torch.tensor([float(mine)])
        work = dist.all_reduce(message, dist.ReduceOp.MIN, group=self._group, async_op=True)
        assert work is not None
        self._under_way = work, message
        return False

    def settle(self) -> bool:
        """Waits for the question that is under way; whether all ranks were ready."""
        if self._under_way is None:
            return False
        work, message = self._under_way
        self._under_way = None
        work.wait()
        return bool(message.item())
