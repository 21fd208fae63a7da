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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from conftest import need
from hosts import CHECKOUT, Process, TestHost, many_hosts, trusting
from tiny import tiny_data, tiny_model

from hynb.config import Config, to_yaml
from hynb.runs import RunDir, RunReader
from hynb.supervision import LAUNCH_VARIABLE

HOSTS = 16
TRAINING_HOSTS = 4
# Longest waits, for a machine that is busy with other work.
SECONDS = 300.0
SILENCE_SECONDS = 6

# What `hynb launch` does, with a command of the test's own in place of DeepSpeed's.
LAUNCH = """
import os, socket, sys, time, uuid
from hynb.config import read_yaml, to_yaml
from hynb.files import replace_text, write_json
from hynb.runs import ProcessId, RunDir
from hynb.supervision import make_plan, prepare, supervise

config = read_yaml(sys.argv[1]).config(sys.argv[1])
run_dir = RunDir(config.output_dir)
run_dir.log.mkdir(parents=True)
replace_text(run_dir.config, to_yaml(config))
run_dir.launcher_log.touch()
plan = make_plan(config)
start = prepare(plan, config, run_dir, uuid.uuid4().hex, {"PYTHONPATH": os.environ["PYTHONPATH"]})
os.environ.update(start.environment)
exports = "".join(f'export {name}="{value}"; ' for name, _, value in
                  (line.partition("=") for line in run_dir.deepspeed_env.read_text().splitlines()))
names = ",".join(host.name for host in plan.hosts)
command = ["pdsh", "-S", "-f", "64", "-w", names, f"{exports} exec {sys.executable} {sys.argv[2]} %n"]
record = start.record | {"argv": command, "process": vars(ProcessId.of(os.getpid()))}
write_json(run_dir.launch, record)
end = supervise(run_dir, record, [os.dup(listener.fileno()) for listener in start.listeners])
write_json(run_dir.exit, end)
"""

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


class Cluster:
    """Hosts with a disk of their own each; runs are launched on the first one."""

    def __init__(self, hosts: Sequence[TestHost]) -> None:
        self.hosts = hosts
        self.first = hosts[0]
        trusting(hosts)

    def on_all(self, name: str, text: str) -> None:
        """Writes a file on every host's disk."""
        for host in self.hosts:
            host.path(host.disk / name).write_text(text)

    def run_dir(self, name: str) -> RunDir:
        """A run folder of the first host."""
        return RunDir(self.first.path(self.first.disk / name))

    def config(self, name: str, **values) -> Path:
        """Writes the configuration of a run; returns its path on the first host."""
        disk = self.first.disk
        given = {
            "model_name_or_path": str(disk / "model"),
            "train_data_file": str(disk / "train.jsonl"),
            "output_dir": str(disk / name),
            "hostfile": str(disk / "cluster" / "hostfile"),
            "start_timeout_seconds": int(SECONDS),
            "silence_timeout_seconds": SILENCE_SECONDS,
        }
        self.first.path(disk / f"{name}.yaml").write_text(to_yaml(Config(**(given | values))))
        return disk / f"{name}.yaml"

    def left(self, name: str) -> list[Process]:
        """Processes of a run on any host."""
        mark = json.loads(self.run_dir(name).launch.read_text())["id"]
        found = [process for host in self.hosts for process in host.processes()]
        return [process for process in found if process.environment.get(LAUNCH_VARIABLE) == mark]


def until(condition: Callable[[], object], what: Callable[[], object]) -> float:
    """Waits for a condition and returns the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < SECONDS, what()
        time.sleep(0.05)
    return time.monotonic() - began


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    need(shutil.which("pdsh") is not None, "pdsh is not installed")
    with many_hosts(tmp_path_factory.mktemp("hosts"), HOSTS, shared=False) as hosts:
        made = Cluster(hosts)
        made.on_all("launch.py", LAUNCH)
        made.on_all("rank.py", RANK)
        yield made


def launched(cluster: Cluster, name: str) -> subprocess.Popen:
    """Starts a run whose ranks run RANK, and waits until all of them count steps."""
    disk = cluster.first.disk
    command = [sys.executable, disk / "launch.py", cluster.config(name), disk / "rank.py"]
    with cluster.first.path(disk / f"{name}.out").open("wb") as output:
        process = cluster.first.popen(
            command, env={"PYTHONPATH": str(CHECKOUT)}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    log = cluster.run_dir(name).log

    def all_count() -> bool:
        # Each host's guard sends its rank's log to the first host.
        return len(steps_of(log)) == HOSTS and all(steps_of(log).values())

    took = until(
        all_count, lambda: (cluster.first.path(disk / f"{name}.out").read_text()[-3000:], list(log.iterdir()))
    )
    print(f"{HOSTS} hosts joined and began in {took:.1f} s")
    return process


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
    run_dir, lost = cluster.run_dir("broken"), cluster.hosts[11]
    lost.link(up=False)
    try:
        took = until(lambda: run_dir.exit.exists() and not cluster.left("broken"), lambda: cluster.left("broken"))
    finally:
        lost.link(up=True)
    print(f"the loss of a host ended all in {took:.1f} s")
    process.wait(SECONDS)
    end = json.loads(run_dir.exit.read_text())
    assert (end["state"], end["host"]) == ("failed", "host11"), end
    assert "host11: this host has been silent for 6 seconds" in end["reason"]
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
    lost = cluster.hosts[TRAINING_HOSTS - 1]
    lost.link(up=False)
    try:
        took = until(lambda: run_dir.exit.exists() and not cluster.left("trained"), lambda: cluster.left("trained"))
    finally:
        lost.link(up=True)
    print(f"the loss of a host ended all in {took:.1f} s")
    end = json.loads(run_dir.exit.read_text())
    assert (end["state"], end["host"]) == ("failed", lost.name), end
    assert f"{lost.name}: this host has been silent for" in end["reason"]
