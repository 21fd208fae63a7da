"""Sixteen hosts under one supervisor: they join, train, and end together, also when one of them is lost.

Sixteen launchers and ranks that import torch take minutes on two cores, so the ranks of the sixteen hosts run a small
loop in place of training; all else (ssh, pdsh, guards, supervisor, logs) is real. Four hosts train a tiny model.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import SECONDS, SILENCE_SECONDS, Cluster, until
from conftest import need
from hosts import TestHost, many_hosts
from tiny import tiny_data, tiny_model

from hynb.runs import RunReader

HOSTS = 16
TRAINING_HOSTS = 4

# A rank that joins as one that trains does, and then counts steps until its host has a file `finish`.
RANK = """
import sys, time
from pathlib import Path
from hynb.runs import RunDir, RunWriter
from hynb.supervision import Membership, join, leave, mark

rank = int(sys.argv[1])
membership = Membership.from_environment()
run_dir = RunDir(membership.run_folder)
writer = RunWriter(run_dir.path) if rank == 0 else None
if writer:
    writer.start()
joined = join(membership, rank)
for stage in ("meeting", "met"):
    mark(membership, rank, stage)
step = 0
while not (Path(sys.argv[0]).parent / f"finish {run_dir.path.name}").exists():
    step += 1
    print(f"rank {rank} on {joined.host}: step {step}", flush=True)
    if writer:
        writer.status("running", global_step=step)
    time.sleep(0.2)
if writer:
    writer.status("finished", global_step=step, exit_code=0)
    writer.close()
leave(membership, rank, 0)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    need(shutil.which("pdsh") is not None, "pdsh is not installed")
    with many_hosts(tmp_path_factory.mktemp("hosts"), HOSTS, shared=False) as hosts:
        made = Cluster(hosts)
        made.on_all("rank.py", RANK)
        yield made


def launched(cluster: Cluster, name: str) -> subprocess.Popen:
    """Starts a run whose ranks run RANK, and waits until all of them count steps."""
    process = cluster.launch(name, sys.executable, cluster.first.disk / "rank.py")
    log = cluster.run_dir(name).log

    def all_count() -> bool:
        # Each host's guard sends its rank's log to the first host.
        return len(steps_of(log)) == HOSTS and all(steps_of(log).values())

    took = until(all_count, lambda: (cluster.output(name).read_text()[-3000:], list(log.iterdir())))
    print(f"{HOSTS} hosts joined and began in {took:.1f} s")
    return process


def ended_without(cluster: Cluster, name: str, lost: TestHost) -> dict[str, Any]:
    """Pulls a host's cable until its run has ended everywhere; returns the record of the end, with the host."""
    run_dir = cluster.run_dir(name)
    lost.link(up=False)
    try:
        took = until(lambda: run_dir.exit.exists() and not cluster.left(name), lambda: cluster.left(name))
    finally:
        lost.link(up=True)
    print(f"the loss of a host ended all in {took:.1f} s")
    end = json.loads(run_dir.exit.read_text())
    assert (end["state"], end["host"]) == ("failed", lost.name), end
    assert f"{lost.name}: this host has been silent for {SILENCE_SECONDS} seconds" in end["reason"]
    return end


def steps_of(log: Path) -> dict[int, list[str]]:
    """The lines of each rank's log on the first host."""
    return {int(path.stem.rpartition("rank")[2]): path.read_text().splitlines() for path in log.glob("*_rank*.log")}


def test_they_join_train_and_end(cluster):
    process = launched(cluster, "whole")
    run_dir = cluster.run_dir("whole")
    hosts = json.loads(run_dir.hosts.read_text())["hosts"]
    assert [host["state"] for host in hosts] == ["joined"] * HOSTS
    assert [host["name"] for host in hosts] == [host.name for host in cluster.hosts]
    # Each host has a rank and a guard.
    assert len(cluster.left("whole")) >= 2 * HOSTS
    cluster.on_all("finish whole", "")
    took = until(run_dir.exit.exists, lambda: steps_of(run_dir.log))
    print(f"ended in {took:.1f} s")
    process.wait(SECONDS)
    assert json.loads(run_dir.exit.read_text())["state"] == "finished"
    until(lambda: not cluster.left("whole"), lambda: cluster.left("whole"))
    for rank, lines in steps_of(run_dir.log).items():
        # Every line of every rank, whole, once and in order.
        assert lines == [f"rank {rank} on host{rank}: step {step}" for step in range(1, len(lines) + 1)]
        (theirs,) = cluster.hosts[rank].path(cluster.first.disk / "whole" / "log").glob(f"*_rank{rank}.log")
        assert theirs.read_text().splitlines() == lines


def test_a_lost_host_is_named_and_all_others_end(cluster):
    process = launched(cluster, "broken")
    run_dir = cluster.run_dir("broken")
    end = ended_without(cluster, "broken", cluster.hosts[11])
    process.wait(SECONDS)
    assert "rank 11 on host11: step" in end["reason"], "the end of its log, as far as it arrived"
    assert all(line.startswith("rank 11 on host11: step ") for line in steps_of(run_dir.log)[11])
    assert RunReader(run_dir.path).status().state == "failed"


def test_four_hosts_train_a_model_and_lose_one(cluster, tmp_path):
    """The real command on the first four: `hynb launch` with pdsh and DeepSpeed's launcher."""
    tiny_model(tmp_path / "model", "hunyuan_v1_dense")
    tiny_data(tmp_path / "train.jsonl")
    for host in cluster.hosts[:TRAINING_HOSTS]:
        shutil.copytree(tmp_path, host.path(host.disk), dirs_exist_ok=True)
    names = "@".join(host.name for host in cluster.hosts[:TRAINING_HOSTS])
    file = cluster.config("trained", include=names, max_steps=1_000_000, save_steps=100_000, max_seq_length=256)
    run_dir = cluster.run_dir("trained")
    reader = RunReader(run_dir.path)
    began = time.monotonic()
    launch = cluster.first.hynb("launch", "--config", file)
    assert launch.returncode == 0, launch.stderr
    until(
        lambda: reader.status().global_step >= 3 or run_dir.exit.exists(),
        lambda: (reader.status(), run_dir.launcher_log.read_text()[-3000:]),
    )
    assert not run_dir.exit.exists(), reader.status()
    print(f"{TRAINING_HOSTS} hosts trained after {time.monotonic() - began:.1f} s")
    ended_without(cluster, "trained", cluster.hosts[TRAINING_HOSTS - 1])
