"""A small process on each host of a run: tells the supervisor how the ranks are, and ends them when it must.

`python -m hynb.supervision.node_guard` is started by the first rank of a host that gets so far; `join` does it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hynb.config import read_yaml
from hynb.errors import ClusterError
from hynb.files import read_json, replace_text, write_json
from hynb.runs import ProcessId, RunDir, clear_run_folder
from hynb.supervision.link import Link, connect

# Each process of a launch carries it, so that all of them are found whatever became of their parents.
LAUNCH_VARIABLE = "HYNB_LAUNCH_ID"
PING_SECONDS = 1.0
# The host or the network is gone when nothing was heard for so long.
SILENCE_SECONDS = 10.0
_WATCH_SECONDS = 0.1
_FETCH_SECONDS = 0.5
_CHUNK_BYTES = 1 << 20


@dataclass(kw_only=True, frozen=True)
class Membership:
    """What the environment says of the run that a process belongs to.

    Args:
        supervisor_host: the host name of the machine where the supervisor runs.
        hosts: name and number of ranks of each host, in the order of the ranks.
        secret: what guards and supervisor prove to each other.
        start_seconds: how long all hosts may take to join.
    """

    launch_id: str
    run_folder: Path
    supervisor_host: str
    address: str
    port: int
    hosts: tuple[tuple[str, int], ...]
    secret: str
    start_seconds: float

    def variables(self, *, secret_file: Path | None) -> dict[str, str]:
        """The environment variables that say so; the secret itself only where there is no file of it."""
        secret = {"HYNB_SECRET_FILE": str(secret_file)} if secret_file else {"HYNB_SECRET": self.secret}
        return secret | {
            LAUNCH_VARIABLE: self.launch_id,
            "HYNB_RUN_FOLDER": str(self.run_folder),
            "HYNB_SUPERVISOR": f"{self.supervisor_host}@{self.address}@{self.port}",
            "HYNB_HOSTS": ",".join(f"{name}={ranks}" for name, ranks in self.hosts),
            "HYNB_START_SECONDS": f"{self.start_seconds:g}",
        }

    @classmethod
    def from_environment(cls) -> Membership | None:
        """The membership of this process; None in a run on one host.

        Raises:
            ClusterError: the file of the secret, which the launching host puts there, cannot be read.
        """
        if "HYNB_SUPERVISOR" not in os.environ:
            return None
        host, address, port = os.environ["HYNB_SUPERVISOR"].split("@")
        pairs = (item.rpartition("=") for item in os.environ["HYNB_HOSTS"].split(","))
        secret = os.environ.get("HYNB_SECRET", "")
        if file := os.environ.get("HYNB_SECRET_FILE"):
            try:
                secret = Path(file).read_text().strip()
            except OSError as error:
                raise ClusterError(f"{file} on {socket.gethostname()}: cannot be read: {error.strerror}") from None
        return cls(
            launch_id=os.environ[LAUNCH_VARIABLE],
            run_folder=Path(os.environ["HYNB_RUN_FOLDER"]),
            supervisor_host=host,
            address=address,
            port=int(port),
            hosts=tuple((name, int(ranks)) for name, _, ranks in pairs),
            secret=secret,
            start_seconds=float(os.environ["HYNB_START_SECONDS"]),
        )

    def ranks_of(self, node: int) -> range:
        """The ranks of a host."""
        first = sum(ranks for _, ranks in self.hosts[:node])
        return range(first, first + self.hosts[node][1])

    def node_of(self, rank: int) -> int:
        """The host of a rank, by its place in the list."""
        return next(node for node in range(len(self.hosts)) if rank in self.ranks_of(node))

    def registry(self, node: int) -> Path:
        """A folder on the host's own disk, where its ranks and its guard leave notes for each other."""
        return Path(tempfile.gettempdir()) / f"hynb-{self.launch_id}-{node}"


@dataclass(kw_only=True, frozen=True)
class Joined:
    """What a rank learns when all hosts have joined.

    Args:
        host: its host's name in the hostfile.
        shared: all hosts see one run folder; else each has its own.
        first: it is its host's first rank.
        interface: the network interface by which its host reaches the launching one; "" where unknown.
        master_address: where rank 0 is.
    """

    host: str
    shared: bool
    first: bool
    interface: str
    master_address: str


def join(membership: Membership, rank: int) -> Joined:
    """Registers a rank with its host's guard, which is started if need be, and waits for all hosts.

    Raises:
        ClusterError: the supervisor can't be reached from this host.
    """
    node = membership.node_of(rank)
    registry = membership.registry(node)
    registry.mkdir(mode=0o700, exist_ok=True)
    log = _own_log(membership, rank)
    write_json(registry / f"rank{rank}.json", vars(ProcessId.of(os.getpid())) | {"log": str(log)})
    with contextlib.suppress(FileExistsError):
        (registry / "guard").touch(exist_ok=False)
        with (registry / "guard.log").open("wb") as said:
            command = [sys.executable, "-m", "hynb.supervision.node_guard", str(node)]
            # Through a child that ends at once: a launcher ends the descendants of its ranks, and no guard.
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)
    deadline = time.monotonic() + membership.start_seconds + SILENCE_SECONDS
    while (ready := read_json(registry / "ready.json")) is None:
        if time.monotonic() > deadline:
            said = (registry / "guard.log").read_text(errors="replace").strip()
            raise ClusterError(f"{membership.hosts[node][0]}: this host's guard did not get ready. {said}".strip())
        time.sleep(0.05)
    if ready["problem"]:
        raise ClusterError(ready["problem"])
    return Joined(
        host=membership.hosts[node][0],
        shared=ready["shared"],
        first=rank == membership.ranks_of(node)[0],
        interface=ready["interface"],
        master_address=ready["master_address"],
    )


def mark(membership: Membership, rank: int, stage: str) -> None:
    """Notes that a rank has come to a stage: `meeting`, `met`."""
    registry = membership.registry(membership.node_of(rank))
    with contextlib.suppress(FileNotFoundError):
        (registry / f"rank{rank}.{stage}").touch()


def leave(membership: Membership, rank: int, code: int) -> None:
    """A rank's last act: says how it ended."""
    registry = membership.registry(membership.node_of(rank))
    with contextlib.suppress(FileNotFoundError):
        replace_text(registry / f"rank{rank}.end", f"{code}\n")


def processes_of(launch_id: str) -> list[psutil.Process]:
    """Processes on this host that carry a launch's id in their environment, but for the caller."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(LAUNCH_VARIABLE) == launch_id and process.pid != os.getpid():
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def kill_processes(launch_id: str, *, seconds: float = 3.0) -> None:
    """Ends every process of a launch on this host, but for the caller, until none is left."""
    deadline = time.monotonic() + seconds
    while left := processes_of(launch_id):
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        _, alive = psutil.wait_procs(left, timeout=0.2)
        if not any(_runs(process) for process in alive) or time.monotonic() > deadline:
            return


class Guard:
    """One host's guard: threads for pings, for what the supervisor says and for silence; the caller's watches."""

    def __init__(self, membership: Membership, node: int, link: Link) -> None:
        self.shared = _token(membership).exists()
        self._membership = membership
        self._node = node
        self._link = link
        self._registry = membership.registry(node)
        self._heard_at = time.monotonic()
        self._told_to_end = threading.Event()
        self._dismissed = threading.Event()
        self._go: dict[str, Any] | None = None
        self._gone: set[int] = set()
        self._sent_marks: set[str] = set()
        self._offsets: dict[Path, int] = {}

    def run(self) -> None:
        """Guards the ranks of this host until they have ended, or must."""
        hello = {"kind": "hello", "node": self._node, "hostname": socket.gethostname(), "shared": self.shared}
        self._tell(hello)
        for work in (self._listen, self._ping, self._watch_silence):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()
        next_fetch = 0.0
        while not self._told_to_end.wait(_WATCH_SECONDS):
            self._watch_ranks()
            if time.monotonic() >= next_fetch:
                self._fetch()
                next_fetch = time.monotonic() + _FETCH_SECONDS
            if self._gone >= set(self._membership.ranks_of(self._node)):
                break
        if self._told_to_end.is_set():
            kill_processes(self._membership.launch_id)
        # The end of the logs of what was just killed is what tells why.
        self._fetch()
        self._tell({"kind": "bye"})
        while not (self._told_to_end.is_set() or self._dismissed.wait(_WATCH_SECONDS)):
            pass
        if self._told_to_end.is_set():
            kill_processes(self._membership.launch_id)
        if not self.shared:
            RunDir(self._membership.run_folder).secret(self._membership.launch_id).unlink(missing_ok=True)
        self._link.close()

    def _listen(self) -> None:
        while True:
            try:
                message = self._link.receive(SILENCE_SECONDS)
            except OSError:
                # Without its supervisor nobody would ever end this host's ranks.
                if not self._dismissed.is_set():
                    self._told_to_end.set()
                return
            if message is None:
                continue
            self._heard_at = time.monotonic()
            if message["kind"] == "go":
                self._begin(message)
            elif message["kind"] == "kill":
                self._told_to_end.set()
            elif message["kind"] == "bye":
                self._dismissed.set()

    def _ping(self) -> None:
        while not self._dismissed.wait(PING_SECONDS):
            self._tell({"kind": "ping"})

    def _watch_silence(self) -> None:
        while not self._dismissed.wait(PING_SECONDS / 2):
            if time.monotonic() - self._heard_at > SILENCE_SECONDS:
                # At once, from here: the watching thread may hang on a disk that is gone as well.
                self._told_to_end.set()
                kill_processes(self._membership.launch_id)
                shutil.rmtree(self._registry, ignore_errors=True)
                os._exit(1)

    def _begin(self, go: dict[str, Any]) -> None:
        """All hosts are here: prepares a run folder of this host's own and lets the ranks go on."""
        problem = ""
        if not go["shared"] and not self.shared:
            try:
                self._prepare_own_folder(go)
            except OSError as error:
                folder = self._membership.run_folder
                problem = f"output_dir = {folder} on {self._name}: cannot be written: {error.strerror}"
        self._go = go
        ready = {"problem": problem, "shared": go["shared"], "master_address": go["master_address"]}
        write_json(self._registry / "ready.json", ready | {"interface": self._interface()})

    def _prepare_own_folder(self, go: dict[str, Any]) -> None:
        run_dir = RunDir(self._membership.run_folder)
        run_dir.log.mkdir(parents=True, exist_ok=True)
        replace_text(run_dir.config, go["config"])
        replace_text(run_dir.led_from, f"{self._membership.supervisor_host}\n")
        # The log folder is in use already.
        for item in run_dir.run_files() if go["overwrite"] else ():
            if item not in (run_dir.log, run_dir.config):
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        clear_run_folder(read_yaml(run_dir.config).config(str(run_dir.config)))

    def _watch_ranks(self) -> None:
        for path in [*self._registry.glob("rank*.meeting"), *self._registry.glob("rank*.met")]:
            if path.name not in self._sent_marks:
                self._sent_marks.add(path.name)
                rank, stage = path.name.removeprefix("rank").split(".")
                self._tell({"kind": "stage", "rank": int(rank), "stage": stage})
        ended: dict[int, int | None] = {}
        for rank in self._membership.ranks_of(self._node):
            record = read_json(self._registry / f"rank{rank}.json")
            if record is None or rank in self._gone:
                continue
            record.pop("log")
            if not ProcessId(**record).alive():
                end = self._registry / f"rank{rank}.end"
                ended[rank] = int(end.read_text()) if end.exists() else None
        if ended:
            self._gone |= ended.keys()
            # What they wrote has to be there first, for the supervisor to quote.
            self._fetch()
        # A rank that says how it failed comes before those that the launcher ended because of it.
        for rank, code in sorted(ended.items(), key=lambda item: item[1] is None):
            self._tell({"kind": "ended", "rank": rank, "code": code})

    def _fetch(self) -> None:
        """Sends what was added to the ranks' logs and failure records in a folder that the supervisor can't see."""
        if self.shared or self._go is None:
            return
        for path in self._registry.glob("rank*.json"):
            record = read_json(path)
            if record and record["log"]:
                self._send_new(Path(record["log"]))
        for path in RunDir(self._membership.run_folder).log.glob("failure_rank*.json"):
            self._send_new(path)

    def _send_new(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                while data := file.read(_CHUNK_BYTES):
                    # Bytes of any encoding travel in JSON as the characters of their values.
                    self._tell({"kind": "file", "name": path.name, "data": data.decode("latin-1")})
                    self._offsets[path] = file.tell()
        except FileNotFoundError:
            return

    def _tell(self, message: dict[str, Any]) -> None:
        # A connection that is gone shows in the listening thread, or as silence.
        with contextlib.suppress(OSError):
            self._link.send(message)

    @property
    def _name(self) -> str:
        return self._membership.hosts[self._node][0]

    def _interface(self) -> str:
        mine = self._link.local_address
        address = self._membership.address if mine.startswith("127.") or mine == "::1" else mine
        for name, addresses in psutil.net_if_addrs().items():
            if any(item.address.partition("%")[0] == address for item in addresses):
                return name
        return ""


def main(node: int) -> None:
    """Finds the supervisor and guards this host's ranks."""
    membership = Membership.from_environment()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    registry = membership.registry(node)
    link, problem = _find_supervisor(membership)
    if link is None:
        name = membership.hosts[node][0]
        text = (
            f"{name}: the launching host {membership.supervisor_host} can't be reached from here at "
            f"{membership.address}:{membership.port}: {problem}. Open that way in the firewall, or choose another "
            "network with network_interface"
        )
        write_json(registry / "ready.json", {"problem": text})
        time.sleep(SILENCE_SECONDS)
    else:
        Guard(membership, node, link).run()
    shutil.rmtree(registry, ignore_errors=True)


def _find_supervisor(membership: Membership) -> tuple[Link | None, str]:
    addresses = [membership.address]
    if membership.supervisor_host == socket.gethostname():
        # By loopback, so that a host whose network is cut still reaches its own supervisor.
        addresses.insert(0, "127.0.0.1")
    deadline = time.monotonic() + min(SILENCE_SECONDS, membership.start_seconds)
    while True:
        for address in addresses:
            try:
                return connect(address, membership.port, membership.secret), ""
            except OSError as error:
                problem = error.strerror or str(error)
        if time.monotonic() > deadline:
            return None, problem
        time.sleep(0.5)


def _token(membership: Membership) -> Path:
    return RunDir(membership.run_folder).shared_token(membership.launch_id)


def _own_log(membership: Membership, rank: int) -> Path:
    """The file that this rank's output goes to; where a launcher gives it none, one is made."""
    stdout = Path("/proc/self/fd/1").readlink()
    folder = RunDir(membership.run_folder).log
    if stdout.parent == folder:
        return stdout
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.strftime('%Y%m%d%H%M%S')}_rank{rank}.log"
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    return path


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


if __name__ == "__main__":
    main(int(sys.argv[1]))
