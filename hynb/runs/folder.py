"""The paths of all files in a run folder."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

from hynb.errors import RunError
from hynb.files import path_problem
from hynb.runs.records import read_failure

# Of a rank's log: a run of weeks with a line per second writes as much. Its end is what a reader looks at.
LOG_BYTES = 200_000_000
# Characters of a path that cannot be one.
_SHOWN = 200


class RunDir:
    """The paths of all files in a run's output_dir.

    Raises:
        RunError: it cannot be the path of a folder.
    """

    def __init__(self, output_dir: str | Path) -> None:
        if problem := path_problem(str(output_dir)):
            raise RunError(f"run folder {str(output_dir)[:_SHOWN]!r}: {problem}")
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
        self.stacks = self.log / "stacks.txt"
        self.tensorboard = self.path / "tensorboard"
        self.rejected = self.path / "rejected.jsonl"
        self.rejected_evaluation = self.path / "rejected_evaluation.jsonl"
        self.saving = self.path / "saving"
        self.abandoned = self.path / "abandoned"
        self.random_base = self.path / "random_base"
        self.hosts = self.path / "hosts.json"
        self.hostfile = self.path / "deepspeed_hostfile"
        self.deepspeed_env = self.path / "deepspeed_env"
        self.kill_request = self.path / "kill_request"
        self.paste = self.path / "paste_on_hosts.txt"
        self.led_from = self.path / "led_from"

    def create(self, *, group_readable: bool = False) -> None:
        """Creates the folder; a new one is for its owner alone, since logs and rejected lines show data.

        Args:
            group_readable: a folder that is for its owner alone can be read by its group from now on.

        Raises:
            OSError: it cannot be created.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)
        # Other bits, such as that of a folder whose files get its group, stay.
        mode = stat.S_IMODE(self.path.stat().st_mode)
        if group_readable and mode & 0o777 == 0o700:
            self.path.chmod(mode | 0o050)

    def secret(self, launch_id: str) -> Path:
        """The secret that the guards of a run and its supervisor prove to each other."""
        return self.log / f".secret-{launch_id}"

    def shared_token(self, launch_id: str) -> Path:
        """A file that a host sees only if it shares this folder with the launching host."""
        return self.log / f".shared-{launch_id}"

    def rank_log(self, rank: int) -> Path | None:
        """The newest output file of one rank; None when it has written none."""
        return max(self.log.glob(f"*_rank{rank}.log"), default=None)

    def checkpoint(self, global_step: int) -> Path:
        """The folder of one checkpoint; it is complete or does not exist."""
        return self.path / f"checkpoint-{global_step}"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest step first."""
        found = [item for item in self.path.glob("checkpoint-*") if re.fullmatch(r"\d+", item.name[11:])]
        return sorted(found, key=lambda item: int(item.name[11:]))

    def logs_by_rank(self) -> dict[int, Path]:
        """The newest output file of each rank that has written one."""
        newest = {}
        # The launcher's file names begin with the time, so a resumed run's file sorts last.
        for path in sorted(self.log.glob("*_rank*.log")):
            if match := re.search(r"_rank(\d+)\.log$", path.name):
                newest[int(match[1])] = path
        return newest

    def rank_logs(self) -> list[Path]:
        """The newest output file of each rank, in the order of the ranks."""
        return [path for _, path in sorted(self.logs_by_rank().items())]

    def failure(self, rank: int) -> Path:
        """The record of a failed rank: host, time, reason, exit code."""
        return self.log / f"failure_rank{rank}.json"

    def failures(self) -> list[dict[str, Any]]:
        """The records of failed ranks, by the time of their failure."""
        records = [read_failure(path) for path in self.log.glob("failure_rank*.json")]
        return sorted((record for record in records if record), key=lambda record: record["time"])

    def run_files(self) -> list[Path]:
        """Existing files of the run, which `overwrite_output_dir` removes; others in the folder are not hynb's."""
        single = [
            *(self.config, self.ds_config, self.launch, self.exit, self.manifest, self.events),
            *(self.heartbeat, self.status, self.stop_request, self.log, self.tensorboard),
            *(self.rejected, self.rejected_evaluation, self.saving, self.random_base),
            self.abandoned,
            *(self.hosts, self.hostfile, self.deepspeed_env, self.kill_request, self.paste, self.led_from),
        ]
        return [item for item in single if item.exists()] + self.checkpoints()
