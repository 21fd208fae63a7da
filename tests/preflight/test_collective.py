"""The all-reduce of a preflight, as its processes run on a host."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

from hosts import CHECKOUT

from hynb.cluster import free_port
from hynb.preflight.collective import CollectiveRequest, parse_output


def run_ranks(slots: list[int], deadline_seconds: float, *, nodes: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs the ranks of the first hosts, all on this machine; returns what the first one's wrote."""
    request: CollectiveRequest = {
        "node": 0,
        "slots": slots,
        "address": "127.0.0.1",
        "port": free_port(),
        "interface": None,
        "deadline_seconds": deadline_seconds,
    }
    command = [sys.executable, "-m", "hynb.preflight.collective"]
    others = [
        subprocess.Popen([*command, json.dumps(request | {"node": node})], cwd=CHECKOUT) for node in range(1, nodes)
    ]
    done = subprocess.run([*command, json.dumps(request)], capture_output=True, text=True, cwd=CHECKOUT, check=False)
    for process in others:
        process.wait()
    return done


def test_ranks_that_wait_in_vain_are_ended():
    done = run_ranks([1, 1], deadline_seconds=5)
    assert done.returncode == 1 and "no sum within 5 s" in done.stderr.splitlines()[-1]
    assert parse_output(done.stdout) is None


def test_the_sum_of_all_ranks_is_checked():
    done = run_ranks([2], deadline_seconds=300)
    measurement = parse_output("welcome\n" + done.stdout)
    assert done.returncode == 0 and measurement is not None, done.stderr
    assert measurement["correct"] and measurement["ranks"] == 2
    assert measurement["pairs"] == [] and measurement["ring_bytes_per_second"] == 0
    assert measurement["message_bytes"] == 8 << 20, "this machine is fast enough for the largest messages of a CPU"
    assert measurement["bytes_per_second"] > 0


def test_each_pair_of_five_hosts_is_measured():
    done = run_ranks([1, 2, 1, 1, 1], deadline_seconds=300, nodes=5)
    measurement = parse_output(done.stdout)
    assert done.returncode == 0 and measurement is not None, done.stderr
    assert measurement["correct"] and measurement["ranks"] == 6
    assert [pair["nodes"] for pair in measurement["pairs"]] == [
        list(pair) for pair in itertools.combinations(range(5), 2)
    ]
    assert all(0 < pair["latency_seconds"] < 1 for pair in measurement["pairs"])
    assert all(pair["bytes_per_second"] > 0 for pair in measurement["pairs"])
    assert measurement["ring_bytes_per_second"] > 0
