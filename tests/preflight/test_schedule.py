"""The rounds in which pairs of hosts are measured, and the size of their messages."""

from __future__ import annotations

import itertools

import pytest

from hynb.preflight.report import Report
from hynb.preflight.schedule import message_bytes, pair_seconds, rounds

MB = 1 << 20


@pytest.mark.parametrize("hosts", range(2, 65))
def test_every_pair_once_and_no_host_twice_in_a_round(hosts):
    found = rounds(hosts)
    assert len(found) == (hosts if hosts % 2 else hosts - 1)
    for pairs in found:
        busy = [host for pair in pairs for host in pair]
        assert len(busy) == len(set(busy)) == hosts - hosts % 2
    every = sorted(pair for pairs in found for pair in pairs)
    assert every == list(itertools.combinations(range(hosts), 2))


def test_one_host_has_no_pairs():
    assert [pairs for pairs in rounds(1) if pairs] == []


@pytest.mark.parametrize("gigabytes_per_second", [400, 50, 1, 0.1])
@pytest.mark.parametrize("hosts", [2, 7, 16, 64])
def test_all_rounds_end_within_the_deadline(hosts, gigabytes_per_second):
    """Simulated: a round lasts as long as its slowest pair, which sends each of five messages there and back."""
    deadline_seconds, repeats, largest = 90.0, 5, 256 * MB
    budget_seconds = pair_seconds(hosts, deadline_seconds)

    def seconds(size: int) -> float:
        return 2 * size / (gigabytes_per_second * 1e9)

    size = message_bytes(MB, seconds(MB), budget_seconds / repeats, largest)
    total = len(rounds(hosts)) * (2 * seconds(MB) + repeats * seconds(size))
    assert total <= deadline_seconds / 2
    if gigabytes_per_second >= 50:
        assert size == largest, "a fast network gets messages that show its speed"


def test_a_slow_network_gets_the_smallest_message():
    assert message_bytes(MB, 10.0, 1.0, 256 * MB) == MB
    assert message_bytes(MB, 0.001, 0.01, 256 * MB) == 8 * MB


def test_of_many_pairs_the_slowest_are_shown():
    pairs = [
        {"nodes": list(pair), "latency_seconds": 1e-5, "bytes_per_second": 1e9 if pair == (3, 60) else 50e9}
        for pair in itertools.combinations(range(64), 2)
    ]
    report = Report(
        hosts=[f"host{number}" for number in range(64)],
        cells=[],
        collective={
            "correct": True,
            "ranks": 512,
            "bytes_per_second": 40e9,
            "message_bytes": 256 * MB,
            "ring_bytes_per_second": 20e9,
            "pairs": pairs,
        },
        seconds=80.0,
    )
    lines = report.pair_lines()
    assert lines[0] == "all-reduce over 512 ranks: 40 GB/s with messages of 256 MB"
    assert lines[1] == "each host to the next one, all at once: 20 GB/s"
    assert lines[2] == "2016 pairs of hosts: median 50 GB/s; the slowest:"
    assert lines[3] == "host3 – host60: 1 GB/s, 10 µs one way" and len(lines) == 8
