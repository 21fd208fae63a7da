"""A small process on each host of a run: reports to the supervisor how the ranks are, and ends them when it must.

The first rank of a host that gets so far starts it (`ranks.join`) as `python -m hynb.supervision.node_guard NODE`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from hynb.config import read_yaml
from hynb.errors import HynbError, RunError
from hynb.files import read_json, replace_text, write_json
from hynb.runs import ProcessId, RunDir, check_output_dir, clear_run_folder
from hynb.supervision.connections import connect
from hynb.supervision.link import Link
from hynb.supervision.membership import PING_SECONDS, RANK_VARIABLES, STANDSTILL_SECONDS, Membership
from hynb.supervision.process_end import exit_code_of_zombie, memory_evidence, memory_kills
from hynb.supervision.processes import kill_processes, processes_of
from hynb.supervision.registries import hold_registry, remove_abandoned_registries
from hynb.supervision.session import Session
from hynb.supervision.stacks import collect_stacks

_WATCH_SECONDS = 0.1
_FETCH_SECONDS = 0.5
_CHUNK_BYTES = 1 << 20
# For a connection and each answer of the handshake; the supervisor's host may be busy.
_CONNECT_SECONDS, _SHORTEST_CONNECT_SECONDS = 5.0, 1.0


class Guard:
    """One host's guard: threads for pings, for the supervisor's messages and for silence; the caller's watches.

    Args:
        link: the first connection to the supervisor; others may follow it.
        hello: what the supervisor knows this guard by.
    """

    def __init__(
        self, membership: Membership, node: int, session: Session, link: Link, hello: dict[str, Any]
    ) -> None:
        self.shared = hello["shared"]
        self._membership = membership
        self._node = node
        self._session = session
        self._hello = hello
        self._ranks = Ranks(membership, node)
        self._link = link
        self._local_address = link.local_address
        self._must_end = threading.Event()
        self._dismissed = threading.Event()
        self._go: dict[str, Any] | None = None
        self._offsets: dict[Path, int] = {}
        self._old_failures: dict[Path, int] = {}

    def run(self) -> None:
        """Guards the ranks of this host until they have ended, or must end."""
        for work in (self._listen, self._ping, self._watch_silence):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()
        next_fetch = 0.0
        while not self._must_end.wait(_WATCH_SECONDS):
            self._report_ranks()
            if time.monotonic() >= next_fetch:
                self._fetch()
                next_fetch = time.monotonic() + _FETCH_SECONDS
            if self._ranks.all_ended:
                break
        if self._must_end.is_set():
            kill_processes(self._membership.launch_id)
        # The last lines of the ranks that were just killed show why.
        while not self._fetch(whole=True) and not self._must_end.wait(_WATCH_SECONDS):
            pass
        self._session.send({"kind": "bye"})
        while not (self._must_end.is_set() or self._dismissed.wait(_WATCH_SECONDS)):
            pass
        if self._must_end.is_set():
            kill_processes(self._membership.launch_id)
        if not self.shared:
            RunDir(self._membership.run_folder).secret(self._membership.launch_id).unlink(missing_ok=True)
        self._session.detach()

    def _listen(self) -> None:
        while not self._dismissed.is_set():
            try:
                message = self._session.receive(self._link, self._membership.silence_seconds)
            except OSError:
                if self._dismissed.is_set() or not self._reconnect():
                    # Without its supervisor nobody would ever end this host's ranks.
                    if not self._dismissed.is_set():
                        self._must_end.set()
                    return
                continue
            if message is None:
                continue
            if message["kind"] == "go":
                self._begin(message)
            elif message["kind"] == "kill":
                self._must_end.set()
            elif message["kind"] == "stacks":
                texts = collect_stacks(self._ranks.registry, self._ranks.living_pids())
                self._session.send({"kind": "stacks", "texts": texts})
            elif message["kind"] == "bye":
                self._dismissed.set()

    def _reconnect(self) -> bool:
        """Connects again, as often as the run's parameters allow; False when that is over."""
        if not self._may_reconnect:
            return False
        limit, attempts = self._membership.silence_seconds, self._membership.reconnect_attempts
        timeout_seconds = min(_CONNECT_SECONDS, max(_SHORTEST_CONNECT_SECONDS, limit / 4))
        for _ in itertools.count() if attempts is None else range(attempts):
            link, _problem = connect(
                _addresses(self._membership),
                self._membership,
                self._session,
                self._hello,
                timeout_seconds=timeout_seconds,
            )
            if link is not None:
                self._link = link
                return True
            # Silence for longer than the limit ends this process, from a thread of its own.
            if self._must_end.wait(self._membership.reconnect_seconds):
                return False
        return False

    def _ping(self) -> None:
        # Packets that were lost are sent again after ever longer pauses; a new connection begins without them.
        stale_seconds = max(1.5 * PING_SECONDS, self._membership.silence_seconds / 3)
        while not self._dismissed.wait(PING_SECONDS):
            self._session.send({"kind": "ping"}, keep=False)
            if self._may_reconnect and self._silent_seconds > stale_seconds:
                self._session.detach()

    def _watch_silence(self) -> None:
        turned_at = time.monotonic()
        while not self._dismissed.wait(PING_SECONDS / 2):
            if time.monotonic() - turned_at > PING_SECONDS / 2 + STANDSTILL_SECONDS:
                # This process stood still itself, as where a container is paused.
                self._session.excuse_silence()
            turned_at = time.monotonic()
            if self._silent_seconds > self._membership.silence_seconds:
                # From this thread, at once: the watching thread may hang on a disk that is gone as well.
                self._must_end.set()
                kill_processes(self._membership.launch_id)
                shutil.rmtree(self._ranks.registry, ignore_errors=True)
                os._exit(1)

    @property
    def _may_reconnect(self) -> bool:
        # On the supervisor's own machine only its end closes the connection.
        return self._membership.reconnect_attempts != 0 and not self._local_address.startswith("127.")

    @property
    def _silent_seconds(self) -> float:
        return time.monotonic() - self._session.heard_at

    def _begin(self, go: dict[str, Any]) -> None:
        """All hosts have joined: prepares this host's own run folder, if it has one, and lets the ranks go on."""
        problem = ""
        if not go["shared"] and not self.shared:
            try:
                self._prepare_own_folder(go)
            except HynbError as error:
                problem = f"{self._name}: {'; '.join(error.problems)}"
            except OSError as error:
                folder = self._membership.run_folder
                problem = f"output_dir = {folder} on {self._name}: cannot be written: {error.strerror}"
        self._go = go
        ready = {"problem": problem, "shared": go["shared"], "master_address": go["master_address"]}
        write_json(self._ranks.registry / "ready.json", ready | {"interface": self._interface()})

    def _prepare_own_folder(self, go: dict[str, Any]) -> None:
        """Prepares a folder that only this host sees.

        Raises:
            HynbError: the folder holds something else, as where a run is launched.
        """
        received = self._ranks.registry / "run.yaml"
        replace_text(received, go["config"])
        run_dir, overwrite = RunDir(self._membership.run_folder), bool(go["overwrite"])
        self._old_failures = {path: path.stat().st_mtime_ns for path in self._failures()}
        config = read_yaml(received).config(str(received))
        resuming = config.resume_from_checkpoint is not None
        if problems := check_output_dir(run_dir.path, overwrite=overwrite, resuming=resuming):
            raise RunError(problems)
        run_dir.create(group_readable=config.group_readable)
        run_dir.log.mkdir(exist_ok=True)
        # The log folder is already in use.
        for item in run_dir.run_files() if overwrite else ():
            if item != run_dir.log:
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        clear_run_folder(config)
        replace_text(run_dir.config, go["config"])
        replace_text(run_dir.led_from, f"{self._membership.supervisor_host}\n")

    def _report_ranks(self) -> None:
        for rank, stage in self._ranks.new_stages():
            self._session.send({"kind": "stage", "rank": rank, "stage": stage})
        ended = self._ranks.newly_ended()
        if ended:
            # The supervisor quotes what they wrote, so that has to arrive first.
            self._fetch()
        for record in self._ranks.new_failures():
            self._session.send({"kind": "failure", "record": record})
        absent = self._ranks.absent() if ended else []
        # A rank that recorded how it failed comes before those that the launcher ended because of it.
        for rank, exit_code in sorted(ended.items(), key=lambda item: item[1] is None):
            facts = {"found": self._ranks.found_codes.get(rank), "memory": self._ranks.memory_evidence}
            self._session.send({"kind": "ended", "rank": rank, "code": exit_code, "absent": absent} | facts)
        for rank, seconds in self._ranks.frozen(self._membership.silence_seconds):
            self._session.send({"kind": "frozen", "rank": rank, "seconds": seconds})

    def _fetch(self, *, whole: bool = False) -> bool:
        """Sends what was added to the ranks' logs and failure records in a folder that the supervisor cannot see.

        Args:
            whole: the last lines too, which may have no end yet.

        Returns:
            False if something is left because the supervisor does not keep up, or cannot be reached now.
        """
        if self.shared or self._go is None:
            return True
        logs = [self._send_new(path, whole=whole) for path in self._ranks.logs()]
        # A folder that was refused keeps the records of an earlier run.
        records = [path for path in self._failures() if path.stat().st_mtime_ns != self._old_failures.get(path)]
        # A record is written as a whole, and may have no line's end.
        return all([*logs, *(self._send_new(path, whole=True) for path in records)])

    def _failures(self) -> list[Path]:
        return list(RunDir(self._membership.run_folder).log.glob("failure_rank*.json"))

    def _send_new(self, path: Path, *, whole: bool) -> bool:
        try:
            # A rank begins a large log anew (rotate_output in train/process.py).
            if path.stat().st_size < self._offsets.get(path, 0):
                if not self._send_rest(path.with_name(f"{path.name}.1"), path, whole=True):
                    return False
                self._offsets[path] = 0
            return self._send_rest(path, path, whole=whole)
        except FileNotFoundError:
            return True

    def _send_rest(self, source: Path, path: Path, *, whole: bool) -> bool:
        """Sends what is new in a file, as part of the path whose offset counts."""
        with source.open("rb") as file:
            file.seek(self._offsets.get(path, 0))
            while data := file.read(_CHUNK_BYTES):
                if self._session.is_ahead:
                    return False
                if not whole and len(data) < _CHUNK_BYTES:
                    # If the host is lost now, half of a line would remain as the last one.
                    data = data[: max(data.rfind(b"\n"), data.rfind(b"\r")) + 1]
                if not data:
                    break
                # JSON has no bytes: each travels as the character of its value.
                self._session.send({"kind": "file", "name": path.name, "data": data.decode("latin-1")})
                self._offsets[path] = self._offsets.get(path, 0) + len(data)
                file.seek(self._offsets[path])
        return True

    @property
    def _name(self) -> str:
        return self._membership.hosts[self._node][0]

    def _interface(self) -> str:
        mine = self._local_address
        address = self._membership.address if mine.startswith("127.") or mine == "::1" else mine
        for name, addresses in psutil.net_if_addrs().items():
            if any(item.address.partition("%")[0] == address for item in addresses):
                return name
        return ""


class Ranks:
    """The ranks of one host, known from the notes that they leave in the registry.

    Attributes:
        found_codes: exit codes of ranks that recorded none, where the system still had them; negative for a signal.
        memory_evidence: what shows that the kernel has ended a process for lack of memory; empty for nothing.
    """

    def __init__(self, membership: Membership, node: int) -> None:
        self.registry = membership.registry(node)
        self._launch_id = membership.launch_id
        self._numbers = membership.ranks_of(node)
        self._processes: dict[int, ProcessId] = {}
        self._logs: dict[int, Path] = {}
        self._ended: set[int] = set()
        self._reported_stages: set[str] = set()
        self._reported_failures: set[str] = set()
        self._stopped_since: dict[int, float] = {}
        self.found_codes: dict[int, int] = {}
        self.memory_evidence = ""
        self._memory_kills = memory_kills()

    @property
    def all_ended(self) -> bool:
        """Whether every rank of the host has ended."""
        return self._ended >= set(self._numbers)

    def new_stages(self) -> list[tuple[int, str]]:
        """Rank and stage of the stages that were reached since the last call."""
        new = []
        for path in [*self.registry.glob("rank*.meeting"), *self.registry.glob("rank*.met")]:
            if path.name not in self._reported_stages:
                self._reported_stages.add(path.name)
                rank, stage = path.name.removeprefix("rank").split(".")
                new.append((int(rank), stage))
        return new

    def new_failures(self) -> list[dict[str, Any]]:
        """What ranks recorded of their failures since the last call."""
        records = []
        for path in self.registry.glob("failure_rank*.json"):
            if path.name not in self._reported_failures and (record := read_json(path)):
                self._reported_failures.add(path.name)
                records.append(record)
        return sorted(records, key=lambda record: record["time"])

    def newly_ended(self) -> dict[int, int | None]:
        """Ranks that ended since the last call, with their exit code; None where a rank recorded none."""
        self._register()
        ended: dict[int, int | None] = {}
        for rank, process in self._processes.items():
            if rank not in self._ended and not process.alive():
                end = self.registry / f"rank{rank}.end"
                ended[rank] = int(end.read_text()) if end.exists() else None
                self._note_code(rank, process.pid)
        self._ended |= ended.keys()
        if None in ended.values():
            self.memory_evidence = memory_evidence(self._memory_kills, memory_kills(files=self._memory_kills))
        return ended

    def absent(self) -> list[int]:
        """Ranks that ended before they registered: no process of theirs is left."""
        missing = [rank for rank in self._numbers if rank not in self._processes]
        if not missing:
            return []
        alive = set()
        for process in processes_of(self._launch_id):
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                alive |= {environment[name] for name in RANK_VARIABLES["RANK"] if name in environment}
        return [rank for rank in missing if str(rank) not in alive]

    def frozen(self, seconds: float) -> list[tuple[int, float]]:
        """Ranks whose process has been stopped by a signal for longer than `seconds`, each reported once."""
        now, found = time.monotonic(), []
        for rank, process in self._processes.items():
            status = None
            with contextlib.suppress(psutil.Error):
                status = psutil.Process(process.pid).status() if rank not in self._ended else None
            if status != psutil.STATUS_STOPPED:
                self._stopped_since.pop(rank, None)
            elif now - self._stopped_since.setdefault(rank, now) > seconds:
                found.append((rank, now - self._stopped_since[rank]))
                self._stopped_since[rank] = float("inf")
        return found

    def living_pids(self) -> dict[int, int]:
        """The process ids of the ranks that live."""
        return {rank: process.pid for rank, process in list(self._processes.items()) if process.alive()}

    def logs(self) -> list[Path]:
        """The files that receive the ranks' output."""
        return list(self._logs.values())

    def _await_end(self, rank: int, pid: int) -> None:
        """Reads a rank's exit code at once when it ends; the launcher, which looks once per second, removes it."""
        with contextlib.suppress(OSError):
            descriptor = os.pidfd_open(pid)
            try:
                select.select([descriptor], [], [])
                self._note_code(rank, pid)
            finally:
                os.close(descriptor)

    def _note_code(self, rank: int, pid: int) -> None:
        if (code := exit_code_of_zombie(pid)) is not None:
            self.found_codes[rank] = code

    def _register(self) -> None:
        for rank in self._numbers:
            if rank not in self._processes and (record := read_json(self.registry / f"rank{rank}.json")):
                self._logs[rank] = Path(record["log"])
                self._processes[rank] = ProcessId.from_record(record)
                threading.Thread(target=self._await_end, args=(rank, record["pid"]), daemon=True).start()
                # Of its group of processes; later counts are compared with the first ones.
                self._memory_kills = memory_kills([record["pid"]]) | self._memory_kills


def main(node: int) -> None:
    """Finds the supervisor and guards this host's ranks."""
    membership = Membership.from_environment()
    assert membership is not None, "a rank starts its guard with its own environment"
    if os.fork():
        os._exit(0)
    os.chdir("/")
    # A scheduler sends it to all processes: the ranks save a checkpoint then, and are guarded meanwhile.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    registry = membership.registry(node)
    hold_registry(registry)
    remove_abandoned_registries(registry)
    session = Session()
    shared = RunDir(membership.run_folder).shared_token(membership.launch_id).exists()
    hello = {"node": node, "guard": uuid.uuid4().hex, "hostname": socket.gethostname(), "shared": shared}
    link, problem = _find_supervisor(membership, session, hello)
    if link is None:
        name = membership.hosts[node][0]
        text = (
            f"{name}: cannot reach the launching host {membership.supervisor_host} at "
            f"{membership.address}:{membership.port}: {problem}. Open this connection in the firewall, or choose "
            "another network with network_interface"
        )
        write_json(registry / "ready.json", {"problem": text})
        time.sleep(membership.silence_seconds)
    else:
        Guard(membership, node, session, link, hello).run()
    shutil.rmtree(registry, ignore_errors=True)


def _addresses(membership: Membership) -> list[str]:
    """Where the supervisor listens for this host, in the order in which to try."""
    # Through loopback, so that a host whose network is cut still reaches its own supervisor.
    here = ["127.0.0.1"] if membership.supervisor_host == socket.gethostname() else []
    return [*here, membership.address]


def _find_supervisor(membership: Membership, session: Session, hello: dict[str, Any]) -> tuple[Link | None, str]:
    """The first connection to the supervisor; without one, the reason."""
    deadline = time.monotonic() + min(membership.silence_seconds, membership.start_seconds)
    while True:
        link, problem = connect(_addresses(membership), membership, session, hello, timeout_seconds=_CONNECT_SECONDS)
        if link is not None or time.monotonic() > deadline:
            return link, problem
        time.sleep(0.5)


if __name__ == "__main__":
    main(int(sys.argv[1]))
