"""Names of every file in a run folder, and the identity of a process."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hynb.files import read_json


class RunDir:
    """Names of every file in a run's output_dir; makes nothing."""

    def __init__(self, output_dir: str | Path) -> None:
        self.path = Path(output_dir).expanduser().absolute()
        self.config = self.path / "run.yaml"
        self.ds_config = self.path / "ds_config.json"
        self.launch = self.path / "launch.json"
        self.exit = self.path / "exit.json"
        self.manifest = self.path / "manifest.json"
        self.events = self.path / "events.jsonl"
        self.heartbeat = self.path / "heartbeat"
        self.status = self.path / "status.json"
        self.stop_request = self.path / "stop_request"
        self.log = self.path / "log"
        self.launcher_log = self.log / "launcher.log"
        self.tensorboard = self.path / "tensorboard"
        self.rejected = self.path / "rejected.jsonl"
        self.rejected_evaluation = self.path / "rejected_evaluation.jsonl"
        self.saving = self.path / "saving"
        self.random_base = self.path / "random_base"
        self.hosts = self.path / "hosts.json"
        self.hostfile = self.path / "hostfile"
        self.deepspeed_env = self.path / "deepspeed_env"
        self.kill_request = self.path / "kill_request"
        self.paste = self.path / "paste_on_hosts.txt"
        self.led_from = self.path / "led_from"

    def secret(self, launch_id: str) -> Path:
        """What the processes of a run over several hosts prove to each other."""
        return self.log / f".secret-{launch_id}"

    def shared_token(self, launch_id: str) -> Path:
        """A file that a host sees only where it shares this folder with the launching host."""
        return self.log / f".shared-{launch_id}"

    def rank_log(self, rank: int) -> Path | None:
        """The newest output file of one rank."""
        return max(self.log.glob(f"*_rank{rank}.log"), default=None)

    def checkpoint(self, global_step: int) -> Path:
        """The folder of one checkpoint, complete or absent."""
        return self.path / f"checkpoint-{global_step}"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest step first."""
        found = [item for item in self.path.glob("checkpoint-*") if re.fullmatch(r"\d+", item.name[11:])]
        return sorted(found, key=lambda item: int(item.name[11:]))

    def rank_logs(self) -> list[Path]:
        """The newest output file of each rank, in the order of the ranks; empty when there is none."""
        newest = {}
        # The launcher begins each name with the time, so that a resumed run's file sorts last.
        for path in sorted(self.log.glob("*_rank*.log")):
            if match := re.search(r"_rank(\d+)\.log$", path.name):
                newest[int(match[1])] = path
        return [newest[rank] for rank in sorted(newest)]

    def failure(self, rank: int) -> Path:
        """What a rank that failed has to say."""
        return self.log / f"failure_rank{rank}.json"

    def failures(self) -> list[dict[str, Any]]:
        """Records of the ranks that failed, the first to fail first."""
        records = [read_json(path) for path in self.log.glob("failure_rank*.json")]
        return sorted((record for record in records if record), key=lambda record: record["time"])

    def run_files(self) -> list[Path]:
        """What a run writes and `overwrite_output_dir` removes; nothing else in the folder is ours."""
        single = [
            *(self.config, self.ds_config, self.launch, self.exit, self.manifest, self.events),
            *(self.heartbeat, self.status, self.stop_request, self.log, self.tensorboard),
            *(self.rejected, self.rejected_evaluation, self.saving, self.random_base),
            *(self.hosts, self.hostfile, self.deepspeed_env, self.kill_request, self.paste, self.led_from),
        ]
        return [item for item in single if item.exists()] + self.checkpoints()


@dataclass(kw_only=True, frozen=True)
class ProcessId:
    """A process known by host, pid and start time, so that a reused pid is not taken for it."""

    host: str
    pid: int
    create_time: float

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """The identity of a process that runs on this host."""
        return cls(host=socket.gethostname(), pid=pid, create_time=psutil.Process(pid).create_time())

    def alive(self) -> bool | None:
        """Whether it runs; None when it belongs to another host, where this one can't look."""
        if self.host != socket.gethostname():
            return None
        try:
            process = psutil.Process(self.pid)
            # The clock's resolution differs between /proc readers by at most a tick.
            same = abs(process.create_time() - self.create_time) < 1.0
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
