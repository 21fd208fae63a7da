"""Watches a run over several hosts from the launching one, and ends it everywhere when a part of it fails."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hynb.cluster import Ssh
from hynb.files import write_json
from hynb.runs import RunDir, RunReader, RunWriter
from hynb.supervision.link import Link, accept
from hynb.supervision.node_guard import SILENCE_SECONDS, Membership, kill_processes

# Time for the other ranks to write their reasons, once one has failed.
GRACE_SECONDS = 3.0
_TURN_SECONDS = 0.1
# A guard ends its host's processes within this time, or they are ended over ssh.
_KILL_SECONDS = 2.0
# The launcher's own processes end after the ranks.
_LAUNCHER_END_SECONDS = 30.0
_QUOTED_LINES = 8
_NAME = re.compile(r"\d{14}_rank\d+\.log|failure_rank\d+\.json")


@dataclass(kw_only=True)
class Node:
    """One host as the supervisor knows it."""

    name: str
    ranks: range
    state: str = "waiting"
    link: Link | None = None
    hostname: str = ""
    shared: bool = False
    heard_at: float = 0.0
    ended: dict[int, int | None] = field(default_factory=dict)


@dataclass(kw_only=True, frozen=True)
class Cause:
    """Why a run failed, and where.

    Args:
        weight: of several causes the heaviest is told; of equal ones the first.
    """

    reason: str
    host: str | None
    rank: int | None
    weight: int


class Supervisor:
    """Runs the launcher of a run over several hosts and decides when the run has ended or must.

    Args:
        listeners: sockets that the guards connect to, already listening.
        reach: how hosts are reached when their guard can't be; None where there is no ssh.
        overwrite: hosts with a run folder of their own clear it first.
    """

    def __init__(
        self,
        membership: Membership,
        *,
        command: Sequence[str],
        cwd: Path,
        environment: dict[str, str],
        listeners: Sequence[socket.socket],
        reach: Ssh | None,
        overwrite: bool,
    ) -> None:
        self._membership = membership
        self._dir = RunDir(membership.run_folder)
        self._command = command
        self._cwd = cwd
        self._environment = environment
        self._listeners = listeners
        self._reach = reach
        self._overwrite = overwrite
        names = [name for name, _ in membership.hosts]
        self._nodes = [Node(name=name, ranks=membership.ranks_of(index)) for index, name in enumerate(names)]
        self._inbox: queue.Queue[tuple[Node, dict[str, Any] | None]] = queue.Queue()
        self._causes: list[Cause] = []
        self._failed_at: float | None = None
        self._meeting: set[int] = set()
        self._met: set[int] = set()
        self._ending = False
        self._folder_text = ""
        self._gone_at: float | None = None
        self._met_deadline: float | None = None
        self._log_start = self._dir.launcher_log.stat().st_size

    def run(self) -> dict[str, Any]:
        """Starts the launcher, watches until nothing of the run is left, and returns the record of its end."""
        self._dir.shared_token(self._membership.launch_id).touch()
        self._write_hosts()
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        self._runner = subprocess.Popen(
            self._command, cwd=self._cwd, env=self._environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        self._start_deadline = time.monotonic() + self._membership.start_seconds
        try:
            return self._watch()
        finally:
            launch_id = self._membership.launch_id
            for path in (self._dir.shared_token(launch_id), self._dir.secret(launch_id), self._dir.paste):
                path.unlink(missing_ok=True)

    def _watch(self) -> dict[str, Any]:
        while True:
            self._read_inbox(_TURN_SECONDS)
            now = time.monotonic()
            if self._dir.kill_request.exists():
                self._end_everywhere()
                return {"state": "stopped", "exit_code": -signal.SIGKILL, "reason": self._killed_reason()}
            waiting = any(node.state == "waiting" for node in self._nodes)
            if waiting and self._dir.stop_request.exists():
                self._end_everywhere()
                return {
                    "state": "stopped",
                    "exit_code": 0,
                    "reason": "stopped on request before all hosts had joined",
                }
            if self._failed_at is None:
                self._look(now)
            done = all(node.state == "done" for node in self._nodes)
            if self._failed_at is not None and (done or now >= self._failed_at):
                self._end_everywhere()
                return self._failure_record()
            if done:
                for node in self._nodes:
                    self._tell(node, {"kind": "bye"})
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._runner.wait(_LAUNCHER_END_SECONDS)
                if self._runner.poll() is None:
                    self._end_everywhere()
                ended = RunReader(self._dir.path).status()
                if ended.state in ("finished", "stopped"):
                    return {"state": ended.state, "exit_code": 0, "reason": ended.reason}
                reason = "the ranks ended, but never reported the end of training"
                return {"state": "failed", "exit_code": self._runner.returncode, "reason": reason}

    def _look(self, now: float) -> None:
        """Everything that shows by the time that passes."""
        waiting = [node for node in self._nodes if node.state == "waiting"]
        if waiting:
            self._look_at_start(now, waiting)
            return
        for node in self._nodes:
            if node.state == "joined" and now - node.heard_at > SILENCE_SECONDS:
                self._fail(
                    f"{node.name}: nothing was heard from this host for {SILENCE_SECONDS:g} seconds: it is frozen or "
                    "down, or the network to it is cut",
                    node,
                    weight=2,
                    grace_seconds=0,
                )
        everyone = set(range(self._nodes[-1].ranks[-1] + 1))
        if self._met_deadline is None and self._meeting == everyone:
            self._met_deadline = now + self._membership.start_seconds
        if self._met_deadline is not None and now > self._met_deadline and self._met != everyone:
            missing = sorted(everyone - self._met)
            node = self._nodes[self._membership.node_of(missing[-1])]
            self._fail(
                f"{node.name}: the ranks did not meet within start_timeout_seconds = "
                f"{self._membership.start_seconds:g}; still apart: ranks {', '.join(map(str, missing))}. Open "
                "master_port between all hosts, or choose the network that they share with network_interface",
                node,
                rank=missing[-1],
            )
        if self._runner.poll() is None:
            self._gone_at = None
        elif self._gone_at is None:
            self._gone_at = now
        elif now - self._gone_at > GRACE_SECONDS and self._runner.returncode:
            self._fail(f"the launcher ended with exit code {self._runner.returncode}", None, grace_seconds=0)

    def _look_at_start(self, now: float, waiting: list[Node]) -> None:
        for node in waiting:
            if self._launcher_says(node.name, r"ssh exited with exit code \d+"):
                self._fail(f"{node.name}: did not join: {self._ask(node)}", node, weight=3, grace_seconds=0)
                return
        names = ", ".join(node.name for node in waiting)
        if self._runner.poll() is not None and self._runner.returncode:
            code = self._runner.returncode
            node = waiting[0] if len(waiting) < len(self._nodes) else None
            why = f"the launcher ended with exit code {code} before {names} joined"
            self._fail(why + self._launcher_tail(), node, weight=3, grace_seconds=0)
        elif now > self._start_deadline:
            why = f"{names}: did not join within start_timeout_seconds = {self._membership.start_seconds:g}"
            reasons = "".join(f"\n{node.name}: {self._ask(node)}" for node in waiting)
            self._fail(why + reasons, waiting[0], weight=3, grace_seconds=0)

    def _ask(self, node: Node) -> str:
        """What can be found out about a host that did not join."""
        said = self._launcher_says(node.name, ".+")
        if self._reach is None:
            return f"was its line pasted there? It is in {self._dir.paste}"
        folder = self._dir.log
        script = f'f=$(ls -t "{folder}"/*_rank*.log 2>/dev/null | head -n 1); [ -z "$f" ] || tail -n 6 "$f"'
        answer = self._reach.run(node.name, ["sh", "-c", script], deadline_seconds=8)
        if answer.problem:
            return answer.problem
        told = [line for line in (said, answer.out.strip()) if line]
        return "it answers ssh; " + ("\n".join(told) if told else "no rank of it has written a line yet")

    def _accept(self, listener: socket.socket) -> None:
        while True:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """One guard's connection: pings are answered here, all else goes to the watching thread."""
        node = None
        try:
            link = accept(connection, self._membership.secret)
            hello = link.receive(SILENCE_SECONDS) or {}
            index = hello.get("node")
            if hello.get("kind") != "hello" or index not in range(len(self._nodes)):
                raise ConnectionError("no guard of this run")
            node = self._nodes[index]
            node.heard_at = time.monotonic()
            self._inbox.put((node, hello | {"link": link}))
            while True:
                message = link.receive(SILENCE_SECONDS)
                if message is None:
                    continue
                node.heard_at = time.monotonic()
                if message.get("kind") == "ping":
                    link.send({"kind": "pong"})
                else:
                    self._inbox.put((node, message))
        except OSError:
            if node is not None:
                self._inbox.put((node, None))
            connection.close()

    def _read_inbox(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                node, message = self._inbox.get(timeout=left)
            except queue.Empty:
                return
            self._handle(node, message)

    def _handle(self, node: Node, message: dict[str, Any] | None) -> None:
        if message is None:
            if node.state == "joined":
                self._fail(
                    f"{node.name}: its guard was ended: the host went down, or somebody killed it", node, weight=2
                )
            node.state, node.link = "gone" if node.state != "done" else "done", None
            return
        match message["kind"]:
            case "hello":
                self._join(node, message)
            case "stage":
                (self._met if message["stage"] == "met" else self._meeting).add(message["rank"])
            case "file":
                self._keep(message["name"], message["data"])
            case "ended":
                self._ended(node, message["rank"], message["code"])
            case "bye" if node.state == "joined":
                node.state = "done"
                self._write_hosts()

    def _join(self, node: Node, hello: dict[str, Any]) -> None:
        if node.state != "waiting":
            hello["link"].close()
            return
        node.state, node.link = "joined", hello["link"]
        node.hostname, node.shared = hello["hostname"], hello["shared"]
        self._write_hosts()
        print(f"hynb: {node.name} joined ({node.hostname})", flush=True)
        if any(other.state == "waiting" for other in self._nodes):
            return
        apart = [other for other in self._nodes if not other.shared]
        shared = not apart
        here = socket.gethostname()
        folder = self._membership.run_folder
        if len(apart) == len(self._nodes):
            self._fail(
                f"{here}: is none of the run's hosts, and output_dir = {folder} is no folder that they share: launch "
                f"on {self._nodes[0].name}, or put output_dir on a shared disk",
                None,
            )
        elif 0 < len(apart) < len(self._nodes) - 1:
            self._fail(
                f"output_dir = {folder}: is shared by some of the hosts, but not by "
                f"{', '.join(other.name for other in apart)}: mount it there, or choose a folder that each host has "
                "of its own",
                apart[0],
            )
        else:
            self._folder_text = "one folder, shared by all hosts" if shared else "a folder of its own on each host"
            print(f"hynb: output_dir = {folder}: {self._folder_text}", flush=True)
            self._write_hosts()
            master = self._nodes[0].link.peer_address
            go = {
                "kind": "go",
                "shared": shared,
                "overwrite": self._overwrite,
                "config": self._dir.config.read_text(),
            }
            go["master_address"] = self._membership.address if master.startswith("127.") else master
            for other in self._nodes:
                self._tell(other, go)

    def _keep(self, name: str, data: str) -> None:
        """Writes what a host's guard sent of a log or a failure record into the run folder."""
        if _NAME.fullmatch(name):
            with (self._dir.log / name).open("ab") as file:
                file.write(data.encode("latin-1"))

    def _ended(self, node: Node, rank: int, code: int | None) -> None:
        node.ended[rank] = code
        if code == 0:
            return
        if code is None:
            failing = any(ended for ended in node.ended.values())
            reason = f"rank {rank} on {node.name} ended without a word: killed, or out of memory"
            # Where another rank of the host has failed, the launcher there ended this one.
            self._fail(reason, node, rank=rank, weight=0 if failing else 2)
            return
        self._fail(f"rank {rank} on {node.name} ended with exit code {code}", node, rank=rank, weight=1)

    def _fail(
        self,
        reason: str,
        node: Node | None,
        *,
        rank: int | None = None,
        weight: int = 2,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        if self._ending:
            return
        self._causes.append(Cause(reason=reason, host=node.name if node else None, rank=rank, weight=weight))
        at = time.monotonic() + grace_seconds
        self._failed_at = at if self._failed_at is None else min(self._failed_at, at)

    def _failure_record(self) -> dict[str, Any]:
        """The heaviest cause, in the failed rank's own words where it left some, with the end of its log."""
        spoken = [record for record in self._dir.failures() if not record.get("lost_connection")]
        cause = max(self._causes, key=lambda cause: cause.weight)
        if cause.weight < 2 and spoken:
            rank = spoken[0]["rank"]
            host = self._nodes[self._membership.node_of(rank)].name
            reason = f"rank {rank} on {host}: {spoken[0]['reason']}"
            cause = Cause(reason=reason, host=host, rank=rank, weight=2)
        reason = cause.reason
        if tail := self._quote(cause):
            reason += f"\nThe end of its log:\n{tail}"
        ended = {"exit_code": 1, "reason": reason, "host": cause.host, "rank": cause.rank}
        known = RunReader(self._dir.path).status()
        # Rank 0 is gone: its file has no other writer any more.
        steps = {"global_step": known.global_step, "max_steps": known.max_steps}
        RunWriter(self._dir.path).status("failed", **ended, **steps)
        return {"state": "failed"} | ended

    def _quote(self, cause: Cause) -> str:
        ranks = [cause.rank] if cause.rank is not None else []
        if cause.host is not None and not ranks:
            ranks = next(node.ranks for node in self._nodes if node.name == cause.host)
        for rank in ranks:
            path = self._dir.rank_log(rank)
            if path is not None and (lines := path.read_text(errors="replace").splitlines()):
                return "\n".join(lines[-_QUOTED_LINES:])
        return ""

    def _killed_reason(self) -> str:
        kept = self._dir.checkpoints()
        what = f"the last checkpoint is {kept[-1].name}" if kept else "there is no checkpoint"
        return f"killed on request; {what}"

    def _end_everywhere(self) -> None:
        """Ends all processes of the run on all hosts, and nothing else there."""
        self._ending = True
        now = time.monotonic()
        told = [node for node in self._nodes if node.link is not None and now - node.heard_at < SILENCE_SECONDS]
        for node in self._nodes:
            threading.Thread(target=self._tell, args=(node, {"kind": "kill"}), daemon=True).start()
        # Never with a signal that it can handle: the pdsh runner would end every DeepSpeed job on all hosts.
        if self._runner.poll() is None:
            os.killpg(self._runner.pid, signal.SIGKILL)
            self._runner.wait()
        untold = [node.name for node in self._nodes if node not in told and node.state != "done"]
        self._kill_over_ssh(untold, _KILL_SECONDS)
        deadline = time.monotonic() + _KILL_SECONDS
        while any(node.link is not None for node in told) and time.monotonic() < deadline:
            self._read_inbox(_TURN_SECONDS)
        self._kill_over_ssh([node.name for node in told if node.link is not None], _KILL_SECONDS)
        kill_processes(self._membership.launch_id)

    def _kill_over_ssh(self, hosts: Sequence[str], seconds: float) -> None:
        if self._reach is not None:
            kill_over_ssh(self._reach, hosts, self._membership.launch_id, seconds=seconds)

    def _tell(self, node: Node, message: dict[str, Any]) -> None:
        # A connection that is gone shows where messages are received.
        with contextlib.suppress(OSError):
            if (link := node.link) is not None:
                link.send(message)

    def _launcher_says(self, host: str, pattern: str) -> str:
        """The last lines that pdsh printed for one host, if one of them is like the pattern; else empty."""
        lines = [line for line in self._launcher_lines() if re.match(rf"(pdsh@\S+: )?{re.escape(host)}: ", line)]
        if not any(re.search(pattern, line) for line in lines):
            return ""
        return "\n".join(lines[-_QUOTED_LINES:])

    def _launcher_tail(self) -> str:
        lines = [line for line in self._launcher_lines() if line.strip()][-_QUOTED_LINES:]
        return "; the end of the log:\n" + "\n".join(lines) if lines else ""

    def _launcher_lines(self) -> list[str]:
        with self._dir.launcher_log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace").splitlines()

    def _write_hosts(self) -> None:
        hosts = [{"name": node.name, "ranks": list(node.ranks), "state": node.state} for node in self._nodes]
        write_json(self._dir.hosts, {"hosts": hosts, "output_dir": self._folder_text})


def kill_over_ssh(reach: Ssh, hosts: Sequence[str], launch_id: str, *, seconds: float) -> None:
    """Ends the processes of one launch on hosts whose guard can't be told.

    Args:
        seconds: the longest wait; a host that answers later does it later.
    """
    # Whole variables are compared, so that no other job is touched; needs no Python on the host.
    script = (
        f"for i in 1 2 3; do p=$(grep -lzxF HYNB_LAUNCH_ID={launch_id} /proc/[0-9]*/environ 2>/dev/null "
        '| cut -d/ -f3); [ -z "$p" ] && exit 0; kill -9 $p 2>/dev/null; sleep 0.2; done'
    )
    threads = [threading.Thread(target=reach.run, args=(host, ["sh", "-c", script]), daemon=True) for host in hosts]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
