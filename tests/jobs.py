"""A run over the two hosts of a test, observed from outside of both."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from hosts import Process, TestHost, TestHosts, trusting

from hynb.config import Config, to_yaml
from hynb.runs import RunDir, RunReader
from hynb.supervision import LAUNCH_VARIABLE

Hosts = TypeVar("Hosts", TestHosts, list[TestHost])
# Longest waits, for a machine that is busy with other work; the seconds that an end takes are printed.
END_SECONDS = START_SECONDS = 300.0


@dataclasses.dataclass
class Job:
    """A run launched on alpha, observed from outside of both hosts."""

    hosts: TestHosts | Sequence[TestHost]
    name: str

    @property
    def first(self) -> TestHost:
        """The host that launches."""
        return next(iter(self.hosts))

    @property
    def folder(self) -> Path:
        """The run folder as the hosts see it."""
        return self.first.disk / self.name

    @property
    def dir(self) -> RunDir:
        """The run folder of alpha."""
        return RunDir(self.first.path(self.folder))

    def config(self, **values) -> Config:
        disk = self.first.disk
        given = {
            "model_name_or_path": str(disk / "model"),
            "train_data_file": str(disk / "train.jsonl"),
            "output_dir": str(self.folder),
            "hostfile": str(disk / "cluster" / "hostfile"),
            "max_steps": 1_000_000,
            "save_steps": 100_000,
            "learning_rate": 1e-3,
            "max_seq_length": 256,
            "start_timeout_seconds": 300,
        }
        return Config(**(given | values))

    def cli(self, *words: str, check: bool = True) -> subprocess.CompletedProcess:
        """The `hynb` command on alpha."""
        return self.first.hynb(*words, check=check, timeout=300)

    def launch(self, *words: str, check: bool = True, **values) -> subprocess.CompletedProcess:
        file = self.first.disk / f"{self.name}.yaml"
        self.first.path(file).write_text(to_yaml(self.config(**values)))
        return self.cli("launch", "--config", file, *words, check=check)

    def losses(self) -> dict[int, float]:
        events = RunReader(self.dir.path).events()
        return {event["global_step"]: event["loss"] for event in events if event["kind"] == "log"}

    def until(self, what: Callable[[], object], seconds: float) -> float:
        """Waits for a condition and returns the seconds that it took."""
        started = time.monotonic()
        while not what():
            log = self.dir.launcher_log
            tail = log.read_text()[-2000:] if log.exists() else ""
            assert time.monotonic() - started < seconds, (
                f"{self.status()}\n{tail}\n{RunReader(self.dir.path).log_tail()}"
            )
            time.sleep(0.05)
        return time.monotonic() - started

    def until_trains(self, steps: int = 2) -> None:
        seen = len(self.losses())
        self.until(lambda: len(self.losses()) >= seen + steps or self.dir.exit.exists(), START_SECONDS)
        assert not self.dir.exit.exists(), self.status()

    def until_ended(self, seconds: float) -> float:
        """Waits for the supervisor's record of the end and the end of all processes that can end."""
        return self.until(lambda: self.dir.exit.exists() and not self.left(), seconds)

    def status(self) -> dict:
        """status.json, as rank 0 or the supervisor wrote it last."""
        return json.loads(self.dir.status.read_text()) if self.dir.status.exists() else {}

    def launch_id(self) -> str:
        return json.loads(self.dir.launch.read_text())["id"]

    def left(self, *names: str) -> list[Process]:
        """Processes of this run on the hosts: those that carry its id, and its supervisor."""
        mark, found = self.launch_id(), []
        for host in self.hosts:
            if not names or host.name in names:
                for process in host.processes():
                    marked = process.environment.get(LAUNCH_VARIABLE) == mark
                    if marked or ("hynb.launch" in process.argv and mark in process.argv[-2]):
                        found.append(process)
        return found

    def rank(self, number: int) -> Process:
        """The process of one rank."""
        names = ("RANK", "OMPI_COMM_WORLD_RANK")
        (found,) = (
            item
            for item in self.left()
            if "hynb.train_entry" in item.argv and str(number) in map(item.environment.get, names)
        )
        return found


def made_ready(hosts: Hosts, files: Path) -> Hosts:
    """Gives the hosts keys for each other, and the files of a run."""
    trusting(hosts)
    first = next(iter(hosts))
    for host in [first] if first.shared else hosts:
        shutil.copytree(files, host.path(host.disk), dirs_exist_ok=True)
    return hosts
