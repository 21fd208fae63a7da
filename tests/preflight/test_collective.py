"""The all-reduce of a preflight, as its processes run on a host."""

from __future__ import annotations

import json
import subprocess
import sys

from hosts import CHECKOUT

from hynb.cluster import free_port
from hynb.preflight.collective import CollectiveRequest, parse_output


def run_ranks(slots: list[int], deadline_seconds: float) -> subprocess.CompletedProcess[str]:
    """Runs the ranks of the first host."""
    request: CollectiveRequest = {
        "node": 0,
        "slots": slots,
        "address": "127.0.0.1",
        "port": free_port(),
        "interface": None,
        "deadline_seconds": deadline_seconds,
    }
    command = [sys.executable, "-m", "hynb.preflight.collective", json.dumps(request)]
    return subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, check=False)


def test_ranks_that_wait_in_vain_are_ended():
    done = run_ranks([1, 1], deadline_seconds=5)
    assert done.returncode == 1 and "no sum within 5 s" in done.stderr.splitlines()[-1]
    assert parse_output(done.stdout) is None


def test_the_sum_of_all_ranks_is_checked():
    done = run_ranks([2], deadline_seconds=300)
    measurement = parse_output("welcome\n" + done.stdout)
    assert done.returncode == 0 and measurement is not None, done.stderr
    assert measurement["correct"] and measurement["ranks"] == 2 and measurement["pairs"] == []
    assert measurement["bytes_per_second"] > 0
