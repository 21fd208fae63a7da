"""Which run a process belongs to: what the launching host tells every rank and guard through the environment."""

from __future__ import annotations

import base64
import json
import os
import socket
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hynb.errors import ClusterError

# Every process of a launch carries it, so that all of them are found whatever became of their parents.
LAUNCH_VARIABLE = "HYNB_LAUNCH_ID"
_MEMBERSHIP_VARIABLE = "HYNB_MEMBERSHIP"
_SECRET_VARIABLE = "HYNB_SECRET"
# Where a person starts the ranks: the value of CUDA_VISIBLE_DEVICES in their shell; empty where it is not set.
PASTED_VISIBLE_VARIABLE = "HYNB_VISIBLE_DEVICES"
PING_SECONDS = 1.0
# A loop that comes this much late to its next turn stood still itself, and has heard nobody meanwhile.
STANDSTILL_SECONDS = 2.0
# Under which names the launchers give a rank its numbers, torch's own name first.
RANK_VARIABLES = {
    "RANK": ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"),
    "LOCAL_RANK": ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"),
    "WORLD_SIZE": ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"),
    "LOCAL_SIZE": ("LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"),
}


@dataclass(kw_only=True, frozen=True)
class Membership:
    """The run that a process belongs to.

    Args:
        run_folder: the run folder, at the same path on every host.
        supervisor_host: host name of the machine where the supervisor runs.
        address, port: where the supervisor listens.
        hosts: name and number of ranks of each host, in the order of the ranks.
        secret: known to the processes of this run alone.
        start_seconds: how long all hosts may take to join.
        silence_seconds: a host or rank is considered lost when it has been silent for this long.
        reconnect_attempts: how often a guard tries to connect again; None for as often as silence_seconds allows.
        reconnect_seconds: pause between two attempts.
        devices: of each host's ranks, by the names that CUDA_VISIBLE_DEVICES takes; None for a host where it is not
            set; empty where this is known of no host.
    """

    launch_id: str
    run_folder: Path
    supervisor_host: str
    address: str
    port: int
    hosts: tuple[tuple[str, int], ...]
    secret: str
    start_seconds: float
    silence_seconds: float
    reconnect_attempts: int | None = None
    reconnect_seconds: float = 1.0
    devices: tuple[tuple[str, ...] | None, ...] = ()

    def record(self) -> dict[str, Any]:
        """All but the secret, as plain values for a JSON file."""
        values = asdict(self) | {"run_folder": str(self.run_folder)}
        values.pop("secret")
        return values

    @classmethod
    def from_record(cls, record: dict[str, Any], secret: str) -> Membership:
        """The membership that `record` described."""
        hosts = tuple((name, ranks) for name, ranks in record["hosts"])
        devices = tuple(None if names is None else tuple(names) for names in record["devices"])
        values = {"hosts": hosts, "devices": devices, "run_folder": Path(record["run_folder"]), "secret": secret}
        return cls(**record | values)

    def variables(self, *, secret_file: Path | None) -> dict[str, str]:
        """The environment variables that carry it; the secret itself only where no file holds it.

        The record is encoded in base64, because DeepSpeed's launchers put variables unquoted into a shell's command
        line (deepspeed/launcher/multinode_runner.py, `add_export`) and paths may hold any character.
        """
        encoded = base64.urlsafe_b64encode(
            json.dumps(self.record() | {"secret_file": str(secret_file or "")}).encode()
        )
        secret = {} if secret_file else {_SECRET_VARIABLE: self.secret}
        return secret | {LAUNCH_VARIABLE: self.launch_id, _MEMBERSHIP_VARIABLE: encoded.decode()}

    def secret_text(self, variables: Mapping[str, str]) -> str:
        """The file that carries the secret, and variables of the ranks that are secrets too."""
        return "\n".join((self.secret, *(f"{name}={value}" for name, value in variables.items())))

    @classmethod
    def from_environment(cls) -> Membership | None:
        """The membership of this process, whose environment gets the variables that are secrets.

        None where the ranks were started by hand, without supervision.

        Raises:
            ClusterError: the file that holds the secret cannot be read.
        """
        encoded = os.environ.get(_MEMBERSHIP_VARIABLE)
        if encoded is None:
            return None
        record = json.loads(base64.urlsafe_b64decode(encoded))
        secret = os.environ.get(_SECRET_VARIABLE, "")
        if file := record.pop("secret_file"):
            try:
                secret, *variables = Path(file).read_text(encoding="utf-8").splitlines() or [""]
            except OSError as error:
                raise ClusterError(
                    f"{file} on {socket.gethostname()}: cannot be read: {error.strerror}. Copy the file there from "
                    f"{record['supervisor_host']}, readable by its owner alone"
                ) from None
            os.environ |= dict(line.split("=", 1) for line in variables)
        return cls.from_record(record, secret)

    def ranks_of(self, node: int) -> range:
        """The ranks of a host."""
        first = sum(ranks for _, ranks in self.hosts[:node])
        return range(first, first + self.hosts[node][1])

    def node_of(self, rank: int) -> int:
        """The index of a rank's host."""
        return next(node for node in range(len(self.hosts)) if rank in self.ranks_of(node))

    @property
    def world_size(self) -> int:
        """The number of ranks on all hosts."""
        return sum(ranks for _, ranks in self.hosts)

    def registry(self, node: int) -> Path:
        """A folder on the host's own disk, in which its ranks and its guard leave notes for each other."""
        return Path(tempfile.gettempdir()) / f"hynb-{self.launch_id}-{node}"

    def registry_of(self, rank: int) -> Path:
        """The registry of a rank's host."""
        return self.registry(self.node_of(rank))

    def make_registry(self, node: int) -> Path:
        """Creates the registry, readable by this user alone.

        Raises:
            ClusterError: something else is at its path: another user's folder, a link, a folder open to others.
        """
        folder = self.registry(node)
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            found = folder.lstat()
            private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
            if not private:
                raise ClusterError(
                    f"{folder} on {socket.gethostname()}: exists and is not a folder that this user alone can read; "
                    "somebody else made it. Remove it, and launch again"
                ) from None
        return folder
