"""Sealing a checkpoint: all ranks flush its files to the disk and compute their digests, before it gets its name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hynb.errors import RunError
from hynb.files import write_json
from hynb.runs import CHECKPOINT_RECORD, check_files, checkpoint_files, file_digests, flush
from hynb.train.saving import agreed


def seal(folder: Path, ranks: Sequence[int], *, flushes: bool) -> dict[str, dict[str, Any]]:
    """Flushes the files of a checkpoint and computes their digests; every rank calls it.

    Args:
        folder: the checkpoint under its unfinished name.
        ranks: those that see the same folder; each reads a share of the files.
        flushes: whether this rank is the first of its host, which flushes what the host has in memory.

    Returns:
        Size in bytes and digest of each file, by its path in the folder.

    Raises:
        RunError: a rank cannot read or flush a file; raised on all ranks, with the rank and its host.
    """
    rank, here, mine = dist.get_rank(), {}, {}
    with agreed(folder):
        here = checkpoint_files(folder) if flushes else {}
    # A network disk may show a host's new files to the others late, so each host reports what it sees.
    sizes = _merged(here, ranks)
    with agreed(folder), ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(flush, folder, here) if flushes else None
        mine = file_digests(folder, _shares(sizes, ranks)[rank])
        if flushed:
            flushed.result()
    return dict(sorted(_merged(mine, ranks).items()))


def finish(folder: Path, target: Path, record: Mapping[str, Any]) -> None:
    """Writes the record of a sealed checkpoint, verifies the whole and gives it its name.

    Args:
        target: the checkpoint's final path, which does not exist.

    Raises:
        RunError: a file is missing or does not fit.
        OSError: the disk reports an error.
    """
    write_json(folder / CHECKPOINT_RECORD, dict(record))
    flush(folder, [CHECKPOINT_RECORD])
    if problems := check_files(folder):
        raise RunError([f"{target.name} is not whole and is left as {folder}: {problem}" for problem in problems])
    folder.replace(target)
    flush(target.parent, [])


def _merged(mine: Mapping[str, Any], ranks: Sequence[int]) -> dict[str, Any]:
    """What the given ranks have; every rank of the run calls it."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, dict(mine))
    return {name: value for rank in ranks for name, value in found[rank].items()}


def _shares(sizes: Mapping[str, int], ranks: Sequence[int]) -> dict[int, list[str]]:
    """The files that each rank reads: its own states, which are in its host's memory, and a share of all others."""
    shares: dict[int, list[str]] = {rank: [] for rank in ranks}
    loads = dict.fromkeys(ranks, 0)
    for name in sorted(sizes, key=lambda name: (_owner(name) is None, -sizes[name], name)):
        owner = _owner(name)
        chosen = owner if owner in shares else min(ranks, key=lambda rank: (loads[rank], rank))
        shares[chosen].append(name)
        loads[chosen] += sizes[name]
    return shares


def _owner(name: str) -> int | None:
    """The rank that wrote a file of its own, by DeepSpeed's and transformers' names."""
    found = re.search(r"(?:zero_pp_rank_|rng_state_)(\d+)", name)
    return int(found[1]) if found else None
