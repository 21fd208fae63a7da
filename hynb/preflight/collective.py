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

from hynb.preflight.schedule import message_bytes, pair_seconds, rounds

if TYPE_CHECKING:
    import torch

_MARK = "hynb-collective "
_PROBE_BYTES = 1 << 20
# NVLink and InfiniBand reach their bandwidth with large messages only; a CPU's network does with small ones.
_LARGEST_BYTES = {"cuda": 256 << 20, "cpu": 8 << 20}
_ROUNDS = 5
_PINGS = 30
# All hosts of the first measurements together: each of them may take this share of the deadline.
_COLLECTIVE_SHARE = 0.1


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
    """The result of the all-reduce: whether the sum was correct, the speeds, and the size of the messages.

    bytes_per_second: the bus bandwidth of the all-reduce.
    ring_bytes_per_second: what each host sends to the next one while all of them do; 0 with fewer than three hosts.
    """

    correct: bool
    ranks: int
    bytes_per_second: float
    message_bytes: int
    ring_bytes_per_second: float
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
    budget_seconds = request["deadline_seconds"] * _COLLECTIVE_SHARE
    correct, all_reduce_bytes, seconds = _measure_all_reduce(rank, world_size, device, budget_seconds)
    ring = _measure_ring(rank, first_ranks, device, budget_seconds)
    pairs = []
    seconds_per_pair = pair_seconds(len(slots), request["deadline_seconds"])
    # Disjoint pairs measure at the same time; a host's next round begins when both of its pair have ended theirs.
    for pairs_of_round in rounds(len(slots)):
        for nodes in pairs_of_round:
            pairs += _measure_pair(rank, first_ranks, nodes, device, seconds_per_pair)
    gathered: list[tuple[list[PairMeasurement], float]] = [([], 0.0)] * world_size
    dist.all_gather_object(gathered, (pairs, ring))
    if rank == 0:
        measurement: Measurement = {
            "correct": correct,
            "ranks": world_size,
            # The bus bandwidth of nccl-tests: what a ring all-reduce sends per rank.
            "bytes_per_second": 2 * (world_size - 1) / world_size * all_reduce_bytes / seconds,
            "message_bytes": all_reduce_bytes,
            "ring_bytes_per_second": min((speed for _, speed in gathered if speed), default=0.0),
            "pairs": sorted((pair for found, _ in gathered for pair in found), key=lambda pair: pair["nodes"]),
        }
        print(_MARK + json.dumps(measurement), flush=True)
    dist.destroy_process_group()


def _measure_all_reduce(
    rank: int, world_size: int, device: torch.device, budget_seconds: float
) -> tuple[bool, int, float]:
    """Whether the sum was correct, the size of the message in bytes, and the seconds of one all-reduce."""
    import torch
    import torch.distributed as dist

    probe = torch.full((_PROBE_BYTES // 4,), float(rank + 1), device=device)
    dist.all_reduce(probe)
    correct = bool((probe == world_size * (world_size + 1) / 2).all())
    probe_seconds = _seconds_per_round(lambda: dist.all_reduce(probe), device, repeats=1)
    size = _agreed(_size(probe_seconds, budget_seconds / _ROUNDS, device), device)
    values = torch.zeros(size // 4, device=device)
    dist.all_reduce(values)
    return correct, size, _seconds_per_round(lambda: dist.all_reduce(values), device)


def _measure_ring(rank: int, first_ranks: list[int], device: torch.device, budget_seconds: float) -> float:
    """Sends from each host's first rank to the next host's, all at once.

    Returns:
        bytes per second that this rank sent; 0 where it took no part, or there are fewer than three hosts.
    """
    import torch

    if len(first_ranks) < 3:
        return 0.0
    node = first_ranks.index(rank) if rank in first_ranks else None

    def pass_on(values: torch.Tensor) -> None:
        if node is not None:
            following = first_ranks[(node + 1) % len(first_ranks)]
            _exchange(values, following, torch.empty_like(values), first_ranks[node - 1])

    probe = torch.zeros(_PROBE_BYTES, dtype=torch.uint8, device=device)
    pass_on(probe)
    probe_seconds = _seconds_per_round(lambda: pass_on(probe), device, repeats=1)
    size = _agreed(_size(probe_seconds, budget_seconds / _ROUNDS, device), device)
    values = torch.zeros(size, dtype=torch.uint8, device=device)
    seconds = _seconds_per_round(lambda: pass_on(values), device)
    return 0.0 if node is None else size / seconds


def _size(probe_seconds: float, budget_seconds: float, device: torch.device) -> int:
    return message_bytes(_PROBE_BYTES, probe_seconds, budget_seconds, _LARGEST_BYTES[device.type])


def _agreed(size: int, device: torch.device) -> int:
    """The smallest of the sizes that the ranks have chosen."""
    import torch
    import torch.distributed as dist

    sizes = torch.tensor([size], device=device)
    dist.all_reduce(sizes, dist.ReduceOp.MIN)
    return int(sizes.item())


def _exchange(sent: torch.Tensor | None, to: int, received: torch.Tensor | None, source: int) -> None:
    """Sends to one rank while receiving from one; either may be None."""
    import torch.distributed as dist

    operations = [] if sent is None else [dist.P2POp(dist.isend, sent, to)]
    operations += [] if received is None else [dist.P2POp(dist.irecv, received, source)]
    # In a batch, NCCL uses the communicator of all ranks; otherwise it would create one for each pair, for a second.
    for work in dist.batch_isend_irecv(operations):
        work.wait()


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
    rank: int, first_ranks: list[int], nodes: tuple[int, int], device: torch.device, budget_seconds: float
) -> list[PairMeasurement]:
    """Sends back and forth between two hosts' first ranks.

    Returns:
        the measurement on the first of the two ranks, an empty list on all others.
    """
    import torch

    first, second = (first_ranks[node] for node in nodes)
    if rank not in (first, second):
        return []
    is_first, other = rank == first, second if rank == first else first

    def back_and_forth(values: torch.Tensor) -> None:
        if is_first:
            _exchange(values, other, None, other)
            _exchange(None, other, values, other)
        else:
            _exchange(None, other, values, other)
            _exchange(values, other, None, other)

    small, probe = (torch.zeros(size, dtype=torch.uint8, device=device) for size in (1, _PROBE_BYTES))
    back_and_forth(probe)
    latency_seconds = _seconds_per_round(lambda: back_and_forth(small), device, repeats=_PINGS) / 2
    probe_seconds = _seconds_per_round(lambda: back_and_forth(probe), device, repeats=1)
    chosen = torch.tensor([_size(probe_seconds, budget_seconds / _ROUNDS, device)], device=device)
    # The first of the two decides.
    _exchange(chosen if is_first else None, other, None if is_first else chosen, other)
    size = int(chosen.item())
    values = torch.zeros(size, dtype=torch.uint8, device=device)
    bytes_per_second = 2 * size / _seconds_per_round(lambda: back_and_forth(values), device)
    if not is_first:
        return []
    return [{"nodes": list(nodes), "latency_seconds": latency_seconds, "bytes_per_second": bytes_per_second}]


def _seconds_per_round(act: Callable[[], object], device: torch.device, *, repeats: int = _ROUNDS) -> float:
    """Seconds that a call takes, the mean of several."""
    import torch

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        act()
    synchronize()
    return (time.perf_counter() - began) / repeats


if __name__ == "__main__":
    if len(sys.argv) == 3:
        run_rank(json.loads(sys.argv[1]), int(sys.argv[2]))
    else:
        sys.exit(main(json.loads(sys.argv[1])))
