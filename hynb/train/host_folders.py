"""Run folders of several hosts that share no disk: what rank 0 writes is handed to the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hynb.errors import RunError
from hynb.runs import check_checkpoint
from hynb.supervision import Membership

_CHUNK_BYTES = 64 << 20


class OwnFolders:
    """A run folder on each host; every rank makes one at the same moment.

    Args:
        membership: the hosts and their ranks.
        rank: of this process.
    """

    def __init__(self, membership: Membership, rank: int) -> None:
        node = membership.node_of(rank)
        self._host = membership.hosts[node][0]
        self._rank = rank
        firsts = [membership.ranks_of(index)[0] for index in range(len(membership.hosts))]
        self.first_here = rank in firsts
        # Files travel between hosts in host memory, whatever the ranks' own backend is.
        self._group = dist.new_group(firsts, backend="gloo")

    def agree_on(self, resume: Path | None) -> str | None:
        """The checkpoint that rank 0 resumes from, once it is certain that every host has it.

        Raises:
            RunError: a host has not, by name.
        """
        chosen = [str(resume) if resume else None]
        dist.broadcast_object_list(chosen)
        problems = check_checkpoint(Path(chosen[0])) if chosen[0] else []
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (self._host, problems))
        if lacking := {host: said[0] for host, said in found if said}:
            raise RunError([f"{host}: {said}; copy it there from another host" for host, said in lacking.items()])
        return chosen[0]

    def hand_out(self, folder: Path) -> None:
        """Sends the files that rank 0 has in a folder, and another host has not, to that host.

        Optimizer and random states stay: each rank has written its own into its host's folder.
        """
        if not self.first_here:
            dist.barrier()
            return
        listed: list[Any] = [None]
        if self._rank == 0:
            files = (path for path in sorted(folder.rglob("*")) if path.is_file())
            names = [str(path.relative_to(folder)) for path in files]
            listed = [[name for name in names if not name.startswith(("global_step", "rng_state"))]]
        dist.broadcast_object_list(listed, src=0, group=self._group)
        for name in listed[0]:
            self._hand_out_file(folder / name)
        dist.barrier()

    def _hand_out_file(self, path: Path) -> None:
        sizes = [path.stat().st_size if self._rank == 0 else None]
        dist.broadcast_object_list(sizes, src=0, group=self._group)
        if self._rank != 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        left = sizes[0]
        with path.open("rb" if self._rank == 0 else "wb") as file:
            while left:
                chunk = torch.empty(min(left, _CHUNK_BYTES), dtype=torch.uint8)
                if self._rank == 0:
                    file.readinto(chunk.numpy())
                dist.broadcast(chunk, src=0, group=self._group)
                if self._rank != 0:
                    file.write(chunk.numpy())
                left -= len(chunk)
