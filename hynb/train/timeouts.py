"""How long ranks wait for each other: a limit of our own for each phase, and which rank was late when it is reached.

DeepSpeed creates the process group with a limit of 10 minutes (DeepSpeed 0.19.8, constants.py), and torch gives each
further group its own default (torch 2.13, distributed_c10d.py `_get_default_timeout`); a whole save takes longer.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import (
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]  torch documents it under this name
    distributed_c10d,
)

from hynb.cluster import listener_of
from hynb.errors import RunFailedError

# Where ranks have work of different lengths: rank 0 checks all data before it meets the others, and each host loads
# at the rate of its own disk. The supervisor ends all ranks if one of them ends meanwhile.
_UNEVEN_WORK_LIMIT = timedelta(days=1)
# Time for the other ranks to note that they have waited in vain too.
_NOTES_SECONDS = 3.0
# What a disk writes per second at the least.
_SLOW_DISK_BYTES_PER_SECOND = 100e6
_TIMED_OUT = ("Timed out waiting", "timed out", "Timeout(ms)=", "Timeout was reached")

_store: TCPStore | None = None


def create_process_group(backend: str, limit: timedelta) -> None:
    """Waits until all ranks are there, however long rank 0 takes, and creates the group of all ranks.

    Args:
        limit: of each collective operation from then on, in every group.

    Raises:
        RunFailedError: another program has taken the port since it was chosen.
    """
    global _store
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    options: dict[str, Any] = {"world_size": world_size, "is_master": rank == 0, "wait_for_workers": False}
    try:
        _store = TCPStore(*address, timeout=_UNEVEN_WORK_LIMIT, **options)
    except dist.DistNetworkError as error:
        # Of all reasons this one has a way out that torch's text does not name.
        if "EADDRINUSE" not in str(error):
            raise
        raise RunFailedError(
            f"port {address[1]}, at which the ranks meet, was free at the launch and has been taken since: "
            f"{listener_of(address[1]) or 'a connection or a program of another user'} has it. Start the run again; "
            "where master_port is given, with another one"
        ) from None
    # The same limit holds for what the ranks tell each other while the group is created.
    dist.init_process_group(backend, store=_store, rank=rank, world_size=world_size, timeout=_UNEVEN_WORK_LIMIT)
    dist.barrier()
    _set_limit(limit)


def collective_limit() -> timedelta:
    """The limit of collective operations now."""
    return distributed_c10d.default_pg_timeout


def _set_limit(limit: timedelta) -> timedelta:
    """Gives all groups, and those that are created later, another limit; returns the one before."""
    before = collective_limit()
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, name, limit)
    for group in list(distributed_c10d._world.pg_map):
        with contextlib.suppress(ValueError):
            # A group of other ranks.
            distributed_c10d._set_pg_timeout(limit, group)
    return before


@contextmanager
def limited(limit: timedelta) -> Iterator[None]:
    """Another limit for a while."""
    before = _set_limit(limit)
    try:
        yield
    finally:
        _set_limit(before)


@contextmanager
def uneven_work() -> Iterator[None]:
    """For work that takes ranks different times: at its end all ranks wait for the last one, however long."""
    with limited(_UNEVEN_WORK_LIMIT):
        yield
        dist.barrier()


def save_limit(size_bytes: int, minutes: float | None, collective: timedelta) -> timedelta:
    """The limit while a checkpoint is written.

    Args:
        size_bytes: of the checkpoint.
        minutes: as the user wants it; None for the time of a slow disk (100 MB/s), or of a collective operation.
    """
    if minutes is not None:
        return timedelta(minutes=minutes)
    return max(collective, timedelta(seconds=size_bytes / _SLOW_DISK_BYTES_PER_SECOND))


def is_timeout(error: BaseException) -> bool:
    """Whether a collective operation has ended because other ranks did not take part in time."""
    return isinstance(error, (RuntimeError, dist.DistError)) and any(text in str(error) for text in _TIMED_OUT)


def late_ranks() -> list[int]:
    """The ranks that do not wait for others themselves, to be called by each rank whose wait was in vain."""
    if _store is None or not dist.is_initialized():
        return []
    try:
        _store.set(f"waited/{dist.get_rank()}", "")
        time.sleep(_NOTES_SECONDS)
        return [rank for rank in range(dist.get_world_size()) if not _store.check([f"waited/{rank}"])]
    except RuntimeError:
        # Rank 0, which keeps the notes, is gone.
        return []
