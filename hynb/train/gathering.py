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


class LateAnswer:
    """What all ranks say together, known to each one step later, so that none of them waits for it.

    It travels between CPUs, beside the GPUs' own messages. Every rank creates one at the same point, and calls its
    methods in the same order.

    Attributes:
        is_needed: whether there are other ranks to ask.
    """

    def __init__(self) -> None:
        self.is_needed = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if self.is_needed else None
        self._under_way: tuple[dist.Work, torch.Tensor] | None = None

    def ask(self, message: torch.Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """Sends this rank's part."""
        work = dist.all_reduce(message, operation, group=self._group, async_op=True)
        assert work is not None
        self._under_way = work, message

    def take(self) -> torch.Tensor | None:
        """Waits for the answer that is under way; None where there is none."""
        if self._under_way is None:
            return None
        work, message = self._under_way
        self._under_way = None
        work.wait()
        return message


class Readiness:
    """Whether every rank is ready; all learn it at the same step. Every rank creates one at the same point."""

    def __init__(self) -> None:
        self._answer = LateAnswer()

    def of_all(self, mine: bool) -> bool:
        """Whether all ranks were ready at the last call; every rank calls it once per step."""
        if not self._answer.is_needed:
            return mine
        if self.settle():
            return True
        self._answer.ask(torch.tensor([float(mine)]), dist.ReduceOp.MIN)
        return False

    def settle(self) -> bool:
        """Waits for the question that is under way; whether all ranks were ready."""
        answer = self._answer.take()
        return answer is not None and bool(answer.item())
