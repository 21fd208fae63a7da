"""Runs over several hosts that share no disk, with a command of the test's own in place of DeepSpeed's launcher."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hosts import CHECKOUT, Process, TestHost, trusting

from hynb.config import Config, to_yaml
from hynb.runs import RunDir
from hynb.supervision import LAUNCH_VARIABLE

# Longest waits, for a machine that is busy with other work.
SECONDS = 300.0
SILENCE_SECONDS = 6

# What `hynb launch` does, with the given command in place of DeepSpeed's; the number of the host is its last word.
LAUNCH = """
import os, shlex, socket, sys, time, uuid
from hynb.config import read_yaml, to_yaml
from hynb.files import replace_text, write_json
from hynb.runs import ProcessId, RunDir, clear_run_folder
from hynb.supervision import make_plan, prepare, supervise

config = read_yaml(sys.argv[1]).config(sys.argv[1])
run_dir = RunDir(config.output_dir)
run_dir.log.mkdir(parents=True, exist_ok=True)
clear_run_folder(config)
run_dir.log.mkdir(exist_ok=True)
replace_text(run_dir.config, to_yaml(config))
run_dir.launcher_log.touch()
plan = make_plan(config)
start = prepare(plan, config, run_dir, uuid.uuid4().hex, {"PYTHONPATH": os.environ["PYTHONPATH"]})
start.write_files()
os.environ.update(start.environment)
exports = "".join(f'export {name}="{value}"; ' for name, _, value in
                  (line.partition("=") for line in run_dir.deepspeed_env.read_text().splitlines()))
names = ",".join(host.name for host in plan.hosts)
command = ["pdsh", "-S", "-f", "64", "-w", names, f"{exports} exec {shlex.join(sys.argv[2:])} %n"]
record = start.record | {"argv": command, "process": ProcessId.of(os.getpid()).record()}
write_json(run_dir.launch, record)
end = supervise(run_dir, record, [os.dup(listener.fileno()) for listener in start.listeners])
write_json(run_dir.exit, end)
"""


class Cluster:
    """Hosts with a disk of their own each; runs are launched on the first one."""

    def __init__(self, hosts: Sequence[TestHost]) -> None:
        self.hosts = hosts
        self.first = hosts[0]
        trusting(hosts)
        self.on_all("launch.py", LAUNCH)

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

    def launch(self, name: str, *words: object, **values) -> subprocess.Popen:
        """Starts a run on all hosts whose ranks are started by a command; its output is in a file `NAME.out`."""
        command = [sys.executable, self.first.disk / "launch.py", self.config(name, **values), *words]
        with self.output(name).open("wb") as output:
            return self.first.popen(
                command, env={"PYTHONPATH": str(CHECKOUT)}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def output(self, name: str) -> Path:
        """The output of a launch."""
        return self.first.path(self.first.disk / f"{name}.out")

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
