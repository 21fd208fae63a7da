"""A value of each rank, known to all of them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def of_all_ranks(value: Any) -> list[Any]:
    """The values of all ranks, by rank; every rank calls it, and one process alone has its own."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
