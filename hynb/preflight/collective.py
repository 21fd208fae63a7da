"""A small all-reduce over all ranks of a cluster, and the speed between each pair of hosts.

`python -m hynb.preflight.collective REQUEST` runs on every host; the first host's prints the measurement.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import torch

_MARK = "hynb-collective "
_PAIR_BYTES = 8 << 20
_ALL_REDUCE_BYTES = 4 << 20
_ROUNDS = 5
_PINGS = 30


class CollectiveRequest(TypedDict):
    """What one host's ranks are to do.

    node: index of this host.
    slots: number of ranks of every host.
    address, port: where the ranks meet, on the first host.
    interface: this host's network interface; None for the library's choice.
    deadline_seconds: after this time the ranks are ended, even if nobody waits for them any more.
    """

    node: int
    slots: list[int]
    address: str
    port: int
    interface: str | None
    deadline_seconds: float


class PairMeasurement(TypedDict):
    """The speed between the first ranks of two hosts, given by their indices; latency is one way."""

    nodes: list[int]
    latency_seconds: float
    bytes_per_second: float


class Measurement(TypedDict):
    """The result of the all-reduce: whether the sum was correct, the bus bandwidth, and the speed of each pair."""

    correct: bool
    ranks: int
    bytes_per_second: float
    pairs: list[PairMeasurement]


def parse_output(output: str) -> Measurement | None:
    """The measurement in the first host's output; None if there is none."""
    line = next((line for line in output.splitlines() if line.startswith(_MARK)), None)
    return None if line is None else json.loads(line.removeprefix(_MARK))


def main(request: CollectiveRequest) -> int:
    """Starts this host's ranks and waits for them; returns an exit code."""
    signal.signal(signal.SIGALRM, _raise_timeout)
    signal.alarm(int(request["deadline_seconds"]))
    first = sum(request["slots"][: request["node"]])
    ranks = [
        subprocess.Popen([sys.executable, "-m", "hynb.preflight.collective", json.dumps(request), str(first + index)])
        for index in range(request["slots"][request["node"]])
    ]
    try:
        return max(abs(rank.wait()) for rank in ranks)
    except TimeoutError:
        print(
            f"no sum within {request['deadline_seconds']:g} s: this host's ranks wait for the others. A firewall "
            "drops packets to ports other than the master port, or network_interface is the wrong one",
            file=sys.stderr,
        )
        return 1
    finally:
        for rank in ranks:
            rank.kill()


def _raise_timeout(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError


def run_rank(request: CollectiveRequest, rank: int) -> None:
    """Runs one rank: an all-reduce, and for each host's first rank, measurements with every other host's."""
    signal.alarm(int(request["deadline_seconds"]))
    if request["interface"]:
        os.environ |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), request["interface"])
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    slots = request["slots"]
    first_ranks = [sum(slots[:node]) for node in range(len(slots))]
    device = _join(request, rank, first_ranks)
    world_size = sum(slots)
    values = torch.full((_ALL_REDUCE_BYTES // 4,), float(rank + 1), device=device)
    dist.all_reduce(values)
    correct = bool((values == world_size * (world_size + 1) / 2).all())
    seconds = _seconds_per_round(lambda: dist.all_reduce(values), device)
    # The bus bandwidth of nccl-tests: what a ring all-reduce sends per rank.
    moved_bytes = 2 * (world_size - 1) / world_size * _ALL_REDUCE_BYTES
    pairs = []
    for one in range(len(slots)):
        for other in range(one + 1, len(slots)):
            pairs += _measure_pair(rank, first_ranks, (one, other), device)
            dist.barrier()
    gathered: list[list[PairMeasurement]] = [[] for _ in range(world_size)]
    dist.all_gather_object(gathered, pairs)
    if rank == 0:
        measurement: Measurement = {
            "correct": correct,
            "ranks": world_size,
            "bytes_per_second": moved_bytes / seconds,
            "pairs": [pair for of_rank in gathered for pair in of_rank],
        }
        print(_MARK + json.dumps(measurement), flush=True)
    dist.destroy_process_group()


def _join(request: CollectiveRequest, rank: int, first_ranks: list[int]) -> torch.device:
    """Initializes the process group; returns the rank's device."""
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    node = max(index for index, first in enumerate(first_ranks) if first <= rank)
    device = torch.device("cuda", rank - first_ranks[node]) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    address = f"[{request['address']}]" if ":" in request["address"] else request["address"]
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"tcp://{address}:{request['port']}",
        rank=rank,
        world_size=sum(request["slots"]),
        timeout=timedelta(seconds=request["deadline_seconds"]),
    )
    return device


def _measure_pair(
    rank: int, first_ranks: list[int], nodes: tuple[int, int], device: torch.device
) -> list[PairMeasurement]:
    """Sends back and forth between two hosts' first ranks.

    Returns:
        the measurement on the first of the two ranks, an empty list on all others.
    """
    import torch
    import torch.distributed as dist

    first, second = (first_ranks[node] for node in nodes)
    if rank not in (first, second):
        return []

    def back_and_forth(values: torch.Tensor) -> None:
        if rank == first:
            dist.send(values, second)
            dist.recv(values, second)
        else:
            dist.recv(values, first)
            dist.send(values, first)

    small, large = (torch.zeros(size, dtype=torch.uint8, device=device) for size in (1, _PAIR_BYTES))
    back_and_forth(large)
    latency_seconds = _seconds_per_round(lambda: back_and_forth(small), device, rounds=_PINGS) / 2
    bytes_per_second = 2 * _PAIR_BYTES / _seconds_per_round(lambda: back_and_forth(large), device)
    if rank != first:
        return []
    return [{"nodes": list(nodes), "latency_seconds": latency_seconds, "bytes_per_second": bytes_per_second}]


def _seconds_per_round(act: Callable[[], object], device: torch.device, rounds: int = _ROUNDS) -> float:
    """Seconds that a call takes, the mean of several."""
    import torch

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    synchronize()
    began = time.perf_counter()
    for _ in range(rounds):
        act()
    synchronize()
    return (time.perf_counter() - began) / rounds


if __name__ == "__main__":
    if len(sys.argv) == 3:
        run_rank(json.loads(sys.argv[1]), int(sys.argv[2]))
    else:
        sys.exit(main(json.loads(sys.argv[1])))
