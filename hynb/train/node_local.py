"""Run folders on hosts that share no disk: what rank 0 writes is copied to the other hosts.

DeepSpeed calls such storage node-local (`checkpoint.use_node_local_storage`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hynb.supervision import Membership

_CHUNK_BYTES = 64 << 20


class NodeLocalFolders:
    """The run folders of all hosts, one on each. Every rank creates one at the same point.

    Args:
        membership: the hosts and their ranks.
        rank: of this process.

    Attributes:
        is_local_rank_zero: whether this rank is the first of its host.
        local_ranks: the ranks of its host.
    """

    def __init__(self, membership: Membership, rank: int) -> None:
        node = membership.node_of(rank)
        self._host = membership.hosts[node][0]
        self._rank = rank
        first_ranks = [membership.ranks_of(index)[0] for index in range(len(membership.hosts))]
        self.is_local_rank_zero = rank in first_ranks
        self.local_ranks = list(membership.ranks_of(node))
        # Files are sent from host memory, whatever the ranks' own backend is.
        group = dist.new_group(first_ranks, backend="gloo")
        self._group = group if isinstance(group, dist.ProcessGroup) else None

    def copy_to_hosts(self, folder: Path) -> None:
        """Copies the files that rank 0 has in a folder to the other hosts; every rank calls it.

        Optimizer and random states are left out: each rank has written its own on its host.
        """
        if not self.is_local_rank_zero:
            dist.barrier()
            return
        names: list[Any] = [None]
        if self._rank == 0:
            files = (path for path in sorted(folder.rglob("*")) if path.is_file())
            relative = [str(path.relative_to(folder)) for path in files]
            names = [[name for name in relative if not name.startswith(("global_step", "rng_state"))]]
        dist.broadcast_object_list(names, src=0, group=self._group)
        for name in names[0]:
            self._copy_file(folder / name)
        dist.barrier()

    def _copy_file(self, path: Path) -> None:
        sizes = [path.stat().st_size if self._rank == 0 else None]
        dist.broadcast_object_list(sizes, src=0, group=self._group)
        size_bytes = sizes[0] or 0
        chunks = [min(_CHUNK_BYTES, size_bytes - start) for start in range(0, size_bytes, _CHUNK_BYTES)]
        if self._rank == 0:
            with path.open("rb") as file:
                for chunk_bytes in chunks:
                    chunk = torch.frombuffer(bytearray(file.read(chunk_bytes)), dtype=torch.uint8)
                    dist.broadcast(chunk, src=0, group=self._group)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for chunk_bytes in chunks:
                chunk = torch.empty(chunk_bytes, dtype=torch.uint8)
                dist.broadcast(chunk, src=0, group=self._group)
                file.write(chunk.numpy().data)
