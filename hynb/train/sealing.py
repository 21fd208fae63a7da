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
from hynb.train.gathering import of_all_ranks
from hynb.train.saving import agreed


class Sealing:
    """Flushes the files of a checkpoint and computes their digests; every rank creates one at the same point.

    Args:
        folder: the checkpoint under its unfinished name.
        ranks: those that see the same folder; each reads a share of the files.
        flushes: whether this rank is the first of its host, which flushes what the host has in memory.
        own: files of this rank that may not be whole yet, and which it flushes and reads itself.

    Raises:
        RunError: a rank cannot read the folder; raised on all ranks, with the rank and its host.
    """

    def __init__(self, folder: Path, ranks: Sequence[int], *, flushes: bool, own: Sequence[Path] = ()) -> None:
        self.folder = folder
        self._ranks = ranks
        names = [path.relative_to(folder).as_posix() for path in own]
        of_ranks = of_all_ranks(names)
        written_later = {name for rank in ranks for name in of_ranks[rank]}
        here: dict[str, int] = {}
        with agreed(folder):
            if flushes:
                here = checkpoint_files(folder, without=written_later)
        # A network disk may show a host's new files to the others late, so each host reports what it sees.
        self._read = [*_shares(self._merged(here), ranks)[dist.get_rank()], *names]
        self._flushed = [*here, *names]
        self._digests: dict[str, dict[str, Any]] = {}

    def work(self) -> None:
        """This rank's part, without a message to the others.

        Raises:
            OSError: a file cannot be read or flushed.
        """
        with ThreadPoolExecutor(1) as pool:
            flushed = pool.submit(flush, self.folder, self._flushed) if self._flushed else None
            self._digests = file_digests(self.folder, self._read)
            if flushed:
                flushed.result()

    def digests(self) -> dict[str, dict[str, Any]]:
        """Size in bytes and digest of each file, by its path in the folder; every rank calls it after its work."""
        return dict(sorted(self._merged(self._digests).items()))

    def _merged(self, mine: Mapping[str, Any]) -> dict[str, Any]:
        """What the ranks of the folder have; every rank of the run calls it."""
        found = of_all_ranks(dict(mine))
        return {name: value for rank in self._ranks for name, value in found[rank].items()}


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
