"""A small all-reduce over all ranks of a cluster, and the speed between each pair of hosts.

`python -m hynb.preflight.collective REQUEST` runs on every host; the first host's prints what was measured.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

MARK = "hynb-collective "
_PAIR_BYTES = 8 << 20
_ALL_REDUCE_BYTES = 4 << 20
_ROUNDS = 5
_PINGS = 30


def main(request: dict[str, Any]) -> int:
    """Starts this host's ranks and waits; the deadline ends them even when nobody asks any more.

    Args:
        request: node, slots (of every host), address, port, interface (of this host; None for the system's choice),
            deadline_seconds.
    """
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(int(request["deadline_seconds"]))
    first = sum(request["slots"][: request["node"]])
    ranks = [
        subprocess.Popen([sys.executable, "-m", "hynb.preflight.collective", json.dumps(request), str(first + index)])
        for index in range(request["slots"][request["node"]])
    ]
    try:
        return max(abs(rank.wait()) for rank in ranks)
    except TimeoutError:
        waited = f"{request['deadline_seconds']:g} s"
        print(
            f"no sum within {waited}: this host's ranks wait for the others. A firewall drops what they send to any "
            "port but the master's, or network_interface leads elsewhere",
            file=sys.stderr,
        )
        return 1
    finally:
        for rank in ranks:
            rank.kill()


def _late(signum: int, frame: Any) -> None:
    raise TimeoutError


def one_rank(request: dict[str, Any], rank: int) -> None:
    """One rank: joins, sums, and if it is the first of its host, measures against the other hosts' first."""
    signal.alarm(int(request["deadline_seconds"]))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if request["interface"]:
            os.environ[name] = request["interface"]
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    slots = request["slots"]
    firsts = [sum(slots[:node]) for node in range(len(slots))]
    node = max(index for index, first in enumerate(firsts) if first <= rank)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank - firsts[node]) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    address = f"[{request['address']}]" if ":" in request["address"] else request["address"]
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"tcp://{address}:{request['port']}",
        rank=rank,
        world_size=sum(slots),
        timeout=timedelta(seconds=request["deadline_seconds"]),
    )
    values = torch.full((_ALL_REDUCE_BYTES // 4,), float(rank + 1), device=device)
    dist.all_reduce(values)
    total = sum(slots)
    right = bool((values == total * (total + 1) / 2).all())
    seconds = _timed(lambda: dist.all_reduce(values), on_gpu)
    moved = 2 * (total - 1) / max(1, total) * _ALL_REDUCE_BYTES
    found: dict[str, Any] = {"right": right, "ranks": total, "bytes_per_second": moved / seconds, "pairs": []}
    for one in range(len(slots)):
        for other in range(one + 1, len(slots)):
            found["pairs"] += _pair(dist, rank, firsts, (one, other), device, on_gpu)
            dist.barrier()
    gathered: list[Any] = [None] * total
    dist.all_gather_object(gathered, found["pairs"])
    if rank == 0:
        found["pairs"] = [item for items in gathered for item in items]
        print(MARK + json.dumps(found), flush=True)
    dist.destroy_process_group()


def _pair(
    dist: Any, rank: int, firsts: list[int], nodes: tuple[int, int], device: Any, on_gpu: bool
) -> list[dict[str, Any]]:
    """Sends back and forth between two hosts' first ranks; the first of them returns what it measured."""
    import torch

    ranks = [firsts[node] for node in nodes]
    if rank not in ranks:
        return []
    peer = ranks[1] if rank == ranks[0] else ranks[0]

    def back_and_forth(values: Any) -> None:
        if rank == ranks[0]:
            dist.send(values, peer)
            dist.recv(values, peer)
        else:
            dist.recv(values, peer)
            dist.send(values, peer)

    small, large = (torch.zeros(size, dtype=torch.uint8, device=device) for size in (1, _PAIR_BYTES))
    back_and_forth(large)
    latency = _timed(lambda: back_and_forth(small), on_gpu, rounds=_PINGS) / 2
    rate = 2 * _PAIR_BYTES / _timed(lambda: back_and_forth(large), on_gpu)
    if rank != ranks[0]:
        return []
    return [{"nodes": list(nodes), "latency_seconds": latency, "bytes_per_second": rate}]


def _timed(act: Any, on_gpu: bool, rounds: int = _ROUNDS) -> float:
    """Seconds of one round, the mean over several."""
    import torch

    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(rounds):
        act()
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / rounds


if __name__ == "__main__":
    if len(sys.argv) == 3:
        one_rank(json.loads(sys.argv[1]), int(sys.argv[2]))
    else:
        sys.exit(main(json.loads(sys.argv[1])))
