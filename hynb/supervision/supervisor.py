"""Watches a run from the launching host, and ends it on all hosts when a part of it fails."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hynb.cluster import Ssh
from hynb.files import is_there, write_json
from hynb.runs import (
    RunDir,
    RunReader,
    RunWriter,
    how_to_go_on,
    killed_reason,
    name_ranks,
    read_record,
    request_stop,
    stop_cause,
    stopped_end,
    watchdog_abort,
)
from hynb.supervision.connections import Connections, Node
from hynb.supervision.logs import LaunchLogs, append_to_log
from hynb.supervision.membership import STANDSTILL_SECONDS, Membership
from hynb.supervision.process_end import end_text, launcher_end_text
from hynb.supervision.processes import kill_over_ssh, kill_processes
from hynb.supervision.stacks import STACKS_SECONDS, Stacks

logger = logging.getLogger(__name__)

# Time for the other ranks to write their reasons, once one has failed.
GRACE_SECONDS = 3.0
_TURN_SECONDS = 0.1
# A guard ends its host's processes within this time; otherwise they are ended over ssh.
_KILL_SECONDS = 2.0
# The launcher's own processes end after the ranks.
_LAUNCHER_END_SECONDS = 30.0
_UNKNOWN_END = "was killed by a signal that is not known: by a person or a program, or probably for lack of memory"
_KILLED = -1
_LOG_NAME = re.compile(r"\d{14}_rank\d+\.log|failure_rank\d+\.json")


@dataclass(kw_only=True, frozen=True)
class Cause:
    """Why a run failed, and where.

    Args:
        weight: of several causes the heaviest is reported; of equal ones the first. What a killed rank weighs is
            decided when all is known.
    """

    reason: str
    host: str | None
    rank: int | None
    weight: int


class Supervisor:
    """Runs the launcher of a run and decides when the run has ended or must end.

    Args:
        listeners: sockets that the guards connect to, already listening.
        ssh: how hosts are reached when their guard cannot be; None where there is no ssh.
        overwrite: hosts with a run folder of their own clear it first.
        signals: grows when this process gets SIGTERM, which then is a request to stop.
    """

    def __init__(
        self,
        membership: Membership,
        *,
        command: Sequence[str],
        cwd: Path,
        environment: dict[str, str],
        listeners: Sequence[socket.socket],
        ssh: Ssh | None,
        overwrite: bool,
        signals: Sequence[int] = (),
    ) -> None:
        self._signals = signals
        self._membership = membership
        self._dir = RunDir(membership.run_folder)
        self._command = command
        self._cwd = cwd
        self._environment = environment
        self._listeners = listeners
        self._ssh = ssh
        self._overwrite = overwrite
        names = [name for name, _ in membership.hosts]
        self._nodes = [Node(name=name, ranks=membership.ranks_of(index)) for index, name in enumerate(names)]
        self._inbox: queue.Queue[tuple[Node, dict[str, Any] | None]] = queue.Queue()
        self._causes: list[Cause] = []
        self._failures: list[dict[str, Any]] = []
        self._failed_at: float | None = None
        self._meeting: set[int] = set()
        self._met: set[int] = set()
        self._ending = False
        self._folder_text = ""
        self._launcher_ended_at: float | None = None
        self._meeting_deadline: float | None = None
        self._logs = LaunchLogs(self._dir)
        self._stacks = Stacks(self._dir, self._nodes)

    def run(self) -> dict[str, Any]:
        """Starts the launcher, watches until nothing of the run is left, and returns the record of its end."""
        self._dir.shared_token(self._membership.launch_id).touch()
        self._write_hosts()
        connections = Connections(self._membership, self._nodes, self._inbox)
        for listener in self._listeners:
            connections.listen(listener)
        # A child inherits what is blocked. On SIGTERM, which a scheduler sends to all processes, DeepSpeed's launcher
        # gives the ranks 30 seconds, and its pdsh runner ends all of DeepSpeed's processes on all hosts (0.19.8,
        # launcher/launch.py and runner.py); a checkpoint may take longer. They end when their ranks have ended. What
        # sshd starts, also on this host, is not kept from it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            self._launcher = subprocess.Popen(
                self._command, cwd=self._cwd, env=self._environment, stdin=subprocess.DEVNULL, start_new_session=True
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._start_deadline = time.monotonic() + self._membership.start_seconds
        try:
            return self._watch()
        finally:
            launch_id = self._membership.launch_id
            for path in (self._dir.shared_token(launch_id), self._dir.secret(launch_id), self._dir.paste):
                path.unlink(missing_ok=True)

    def _watch(self) -> dict[str, Any]:
        turned_at = time.monotonic()
        while True:
            self._read_inbox(_TURN_SECONDS)
            stood_seconds = time.monotonic() - turned_at - _TURN_SECONDS
            if stood_seconds > STANDSTILL_SECONDS:
                self._excuse(stood_seconds)
            turned_at = time.monotonic()
            if record := self._requested_end():
                return record
            now = time.monotonic()
            if self._failed_at is None:
                self._look_for_failures(now)
            done = all(node.state == "done" for node in self._nodes)
            if self._failed_at is not None and (done or now >= self._failed_at):
                self._await_stacks()
                self._end_everywhere()
                return self._failure_record()
            if done:
                return self._normal_end()

    def _await_stacks(self) -> None:
        deadline = time.monotonic() + STACKS_SECONDS
        while not self._stacks.is_complete and time.monotonic() < deadline:
            self._read_inbox(_TURN_SECONDS)

    def _excuse(self, seconds: float) -> None:
        """Leaves a time out of all limits in which this process itself stood still, as in a paused container."""
        for node in self._nodes:
            node.session.excuse_silence()
        self._start_deadline += seconds
        if self._meeting_deadline is not None:
            self._meeting_deadline += seconds

    def _requested_end(self) -> dict[str, Any] | None:
        """Ends the run where a person asked for it: killed at any time, or stopped before all hosts had joined."""
        if is_there(self._dir.kill_request):
            self._end_everywhere()
            return {"state": "stopped", "exit_code": -signal.SIGKILL, "reason": killed_reason(self._dir)}
        if self._signals and not is_there(self._dir.stop_request):
            # Tried again at the next turn where the disk refuses it.
            with contextlib.suppress(OSError):
                request_stop(self._dir, "by SIGTERM to its supervisor")
                logger.info("got SIGTERM: the ranks finish their step, save a checkpoint and end")
        if is_there(self._dir.stop_request) and (when := self._before_training()):
            self._end_everywhere()
            return stopped_end(stop_cause(self._dir), f"before {when}")
        return None

    def _before_training(self) -> str:
        """What a run that has not begun to train has yet to do: there is nothing to save; empty once it trains."""
        if any(node.state == "waiting" for node in self._nodes):
            return "all hosts had joined"
        return "training began" if self._recorded()["state"] == "starting" else ""

    def _recorded(self) -> dict[str, Any]:
        """status.json, as rank 0 has written it."""
        return read_record(self._dir.status) or {"state": "starting"}

    def _normal_end(self) -> dict[str, Any]:
        """All ranks have ended without a failure."""
        for node in self._nodes:
            node.session.send({"kind": "bye"})
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._launcher.wait(_LAUNCHER_END_SECONDS)
        if self._launcher.poll() is None:
            self._end_everywhere()
        ended = self._recorded()
        if ended["state"] in ("finished", "stopped"):
            kept = {name: ended[name] for name in ("state", "reason", "terminated") if name in ended}
            return kept | {"exit_code": 0}
        reason = "the ranks ended, but did not report the end of training"
        return {"state": "failed", "exit_code": self._launcher.returncode, "reason": reason}

    def _look_for_failures(self, now: float) -> None:
        """Finds what shows only by the time that passes."""
        waiting = [node for node in self._nodes if node.state == "waiting"]
        if waiting:
            self._look_at_start(now, waiting)
            return
        self._look_for_silence(now)
        self._look_at_meeting(now)
        if self._launcher.poll() is None:
            self._launcher_ended_at = None
        elif self._launcher_ended_at is None:
            self._launcher_ended_at = now
        elif now - self._launcher_ended_at > GRACE_SECONDS and self._launcher.returncode and not self._is_stopping():
            self._fail(launcher_end_text(self._launcher.returncode), None, grace_seconds=0)

    def _is_stopping(self) -> bool:
        """Whether the ranks are to end by themselves: a scheduler may have ended the launcher, such as pdsh's ssh."""
        return is_there(self._dir.stop_request) or self._recorded()["state"] in ("stopping", "stopped", "finished")

    def _look_for_silence(self, now: float) -> None:
        limit = self._membership.silence_seconds
        for node in self._nodes:
            if node.state == "joined" and now - node.session.heard_at > limit:
                self._fail(
                    f"{node.name}: this host has been silent for {limit:g} seconds (silence_timeout_seconds): it is "
                    "frozen or down, or the network to it is cut",
                    node,
                    weight=2,
                    grace_seconds=0,
                )

    def _look_at_meeting(self, now: float) -> None:
        everyone = set(range(self._membership.world_size))
        limit = self._membership.start_seconds
        if self._meeting_deadline is None and self._meeting == everyone:
            self._meeting_deadline = now + limit
        if self._meeting_deadline is not None and now > self._meeting_deadline and self._met != everyone:
            missing = sorted(everyone - self._met)
            node = self._nodes[self._membership.node_of(missing[-1])]
            self._stacks.ask()
            self._fail(
                f"{node.name}: the ranks did not connect to each other within start_timeout_seconds = {limit:g}; "
                f"missing: ranks {', '.join(map(str, missing))}. Open master_port between all hosts, or choose the "
                "network that they share with network_interface",
                node,
                rank=missing[-1],
            )

    def _look_at_start(self, now: float, waiting: list[Node]) -> None:
        for node in waiting:
            if self._logs.launcher_lines_of(node.name, r"ssh exited with exit code \d+"):
                self._fail(f"{node.name}: did not join: {self._diagnose(node)}", node, weight=3, grace_seconds=0)
                return
        names = ", ".join(node.name for node in waiting)
        if self._launcher.poll() is not None and self._launcher.returncode:
            node = waiting[0] if len(waiting) < len(self._nodes) or len(self._nodes) == 1 else None
            reason = f"{launcher_end_text(self._launcher.returncode)} before {names} joined"
            self._fail(reason + self._start_tail(node), node, weight=3, grace_seconds=0)
        elif now > self._start_deadline:
            reason = f"{names}: did not join within start_timeout_seconds = {self._membership.start_seconds:g}"
            details = "".join(f"\n{node.name}: {self._diagnose(node)}" for node in waiting)
            self._fail(reason + details, waiting[0], weight=3, grace_seconds=0)

    def _diagnose(self, node: Node) -> str:
        """What can be found out about a host that did not join."""
        printed = self._logs.launcher_lines_of(node.name, ".+")
        if self._dir.paste.exists():
            return f"was its line pasted there? It is in {self._dir.paste}"
        folder = shlex.quote(str(self._dir.log))
        script = f'f=$(ls -t {folder}/*_rank*.log 2>/dev/null | head -n 1); [ -z "$f" ] || tail -n 6 "$f"'
        if self._ssh is None:
            return self._start_tail(node).removeprefix("; ") or "none of its ranks has written a line yet"
        answer = self._ssh.run(node.name, ["sh", "-c", script], deadline_seconds=8)
        if answer.problem:
            return answer.problem
        found = [text for text in (printed, answer.out.strip()) if text]
        return "it answers ssh; " + ("\n".join(found) if found else "none of its ranks has written a line yet")

    def _start_tail(self, node: Node | None) -> str:
        """The last lines of a rank of the host, or of the launcher, behind a semicolon; empty when there are none."""
        if node and (tail := self._logs.rank_tail(node.ranks)):
            return f"; the end of its log:\n{tail}"
        tail = self._logs.launcher_tail()
        return f"; the end of the log:\n{tail}" if tail else ""

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
            self._connection_broke(node)
            return
        match message["kind"]:
            case "hello":
                self._join(node, message)
            case "stage":
                (self._met if message["stage"] == "met" else self._meeting).add(message["rank"])
            case "file":
                self._append_to_log(message["name"], message["data"])
            case "failure":
                self._failures.append(message["record"])
                if message["record"].get("late"):
                    self._stacks.ask()
            case "stacks":
                self._stacks.add(node, message)
            case "ended":
                self._rank_ended(node, message)
            case "frozen":
                self._rank_frozen(node, message["rank"], message["seconds"])
            case "bye" if node.state == "joined":
                node.state = "done"
                self._write_hosts()

    def _connection_broke(self, node: Node) -> None:
        """A guard's connection is gone: it may come back until the host counts as silent, if it can."""
        if node.is_connected or node.state in ("done", "gone"):
            return
        if self._ending:
            node.state = "gone"
        elif node.is_here or self._membership.reconnect_attempts == 0:
            self._fail(f"{node.name}: its guard ended: the host went down, or somebody killed it", node, weight=2)
            node.state = "gone"
        else:
            logger.info(
                "%s: the connection to its guard broke; waiting for it for %g seconds (silence_timeout_seconds)",
                node.name,
                self._membership.silence_seconds,
            )

    def _join(self, node: Node, hello: dict[str, Any]) -> None:
        node.state = "joined"
        node.hostname, node.shared = hello["hostname"], hello["shared"]
        self._write_hosts()
        logger.info("%s joined (%s)", node.name, node.hostname)
        if any(other.state == "waiting" for other in self._nodes):
            return
        apart = [other for other in self._nodes if not other.shared]
        folder = self._membership.run_folder
        if len(apart) == len(self._nodes):
            here = socket.gethostname()
            self._fail(
                f"{here}: does not take part in the run, and its hosts do not share output_dir = {folder} with it: "
                f"launch on {self._nodes[0].name}, or put output_dir on a shared disk",
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
            self._go(shared=not apart)

    def _go(self, *, shared: bool) -> None:
        """All hosts have joined: their ranks go on."""
        if len(self._nodes) > 1:
            self._folder_text = "one folder, shared by all hosts" if shared else "a folder of its own on each host"
            logger.info("output_dir = %s: %s", self._membership.run_folder, self._folder_text)
        self._write_hosts()
        master = self._nodes[0].address
        message = {
            "kind": "go",
            "shared": shared,
            "overwrite": self._overwrite,
            "config": self._dir.config.read_text(encoding="utf-8"),
            "master_address": self._membership.address if master.startswith("127.") else master,
        }
        for node in self._nodes:
            node.session.send(message)

    def _append_to_log(self, name: str, data: str) -> None:
        """Writes what a host's guard sent of a log or a failure record into the run folder."""
        if _LOG_NAME.fullmatch(name):
            with contextlib.suppress(OSError):
                append_to_log(self._dir.log / name, data.encode("latin-1"))

    def _rank_ended(self, node: Node, message: dict[str, Any]) -> None:
        rank, exit_code, absent = message["rank"], message["code"], message["absent"]
        node.ended[rank] = exit_code
        if exit_code == 0:
            return
        if exit_code is not None:
            self._fail(f"rank {rank} on {node.name} ended with exit code {exit_code}", node, rank=rank, weight=1)
            return
        if absent:
            # The launcher ends all ranks of a host when one of them ends.
            first = absent[0]
            self._fail(f"rank {first} on {node.name} ended before it had started up", node, rank=first, weight=2)
            return
        found = message["found"]
        how = _UNKNOWN_END if found is None else end_text(found, message["memory"])
        self._fail(f"rank {rank} on {node.name} {how}", node, rank=rank, weight=_KILLED)

    def _rank_frozen(self, node: Node, rank: int, seconds: float) -> None:
        reason = (
            f"rank {rank} on {node.name} has been stopped by a signal (SIGSTOP) for {seconds:.0f} seconds "
            "(silence_timeout_seconds), and the other ranks wait for it"
        )
        self._stacks.ask()
        self._fail(reason, node, rank=rank, grace_seconds=0)

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
        cause = self._found_cause()
        reason = cause.reason
        if tail := self._log_tail(cause):
            reason += f"\nThe end of its log:\n{tail}"
        reason += self._stacks.reason(cause.rank)
        reason += f"\n{how_to_go_on(self._dir)}"
        known = RunReader(self._dir.path).status()
        # A full disk must not keep the supervisor from its end, whose record comes after this one.
        with contextlib.suppress(OSError):
            # Rank 0 is gone: its file has no other writer any more.
            RunWriter(self._dir.path).status(
                "failed",
                exit_code=1,
                reason=reason,
                host=cause.host,
                rank=cause.rank,
                global_step=known.global_step,
                max_steps=known.max_steps,
            )
        return {"state": "failed", "exit_code": 1, "reason": reason, "host": cause.host, "rank": cause.rank}

    def _found_cause(self) -> Cause:
        """The cause to report: what a rank recorded, or NCCL's watchdog printed, says more than how a rank ended."""
        failures = self._all_failures()
        cause = self._heaviest_cause(failures)
        if cause.weight >= 2:
            return cause
        reports = [record for record in failures if not record.get("lost_connection")]
        abort = watchdog_abort(self._dir, self._membership.hosts)
        if abort:
            # What ranks report that have waited in vain comes of that.
            reports = [record for record in reports if record["rank"] not in abort.waiting]
        if reports:
            return self._reported_cause(reports[0])
        if abort:
            rank = next(iter(abort.late), None)
            host = None if rank is None else self._host_of(rank)
            return Cause(reason=abort.reason, host=host, rank=rank, weight=2)
        return cause

    def _reported_cause(self, record: dict[str, Any]) -> Cause:
        """The cause that a rank recorded, which may be that other ranks were late."""
        reason, late = record["reason"], record.get("late") or []
        rank = late[0] if late else record["rank"]
        host = self._host_of(rank)
        if late:
            hosts = [name for name, count in self._membership.hosts for _ in range(count)]
            reason = reason.replace(name_ranks(late), name_ranks(late, hosts), 1)
        else:
            reason = f"rank {rank} on {host}: {reason}"
        return Cause(reason=reason, host=host, rank=rank, weight=2)

    def _host_of(self, rank: int) -> str:
        return self._nodes[self._membership.node_of(rank)].name

    def _all_failures(self) -> list[dict[str, Any]]:
        """The ranks' records, in the order in which they arrived, before those that are in the run folder alone."""
        arrived = {record["rank"] for record in self._failures}
        return [*self._failures, *(item for item in self._dir.failures() if item["rank"] not in arrived)]

    def _heaviest_cause(self, failures: Sequence[dict[str, Any]]) -> Cause:
        """The cause to report.

        A launcher kills the other ranks of its host when one fails, so a killed rank is a cause only where no rank
        has failed by itself.

        Args:
            failures: what the ranks recorded; those with `lost_connection` failed because another rank was gone.
        """
        lost_connection = {record["rank"] for record in failures if record.get("lost_connection")}
        own_failure = len(failures) > len(lost_connection)

        def weight(cause: Cause) -> int:
            if cause.weight != _KILLED:
                return cause.weight
            node = next(node for node in self._nodes if node.name == cause.host)
            failed = {rank for rank, code in node.ended.items() if code} - lost_connection
            return 0 if failed or own_failure else 2

        return max(self._causes, key=weight)

    def _log_tail(self, cause: Cause) -> str:
        ranks: Sequence[int] = [cause.rank] if cause.rank is not None else []
        if cause.host is not None and not ranks:
            ranks = next(node.ranks for node in self._nodes if node.name == cause.host)
        return self._logs.rank_tail(ranks)

    def _end_everywhere(self) -> None:
        """Ends all processes of the run on all hosts, and nothing else there."""
        self._ending = True
        now, limit = time.monotonic(), self._membership.silence_seconds
        reached = [node for node in self._nodes if node.is_connected and now - node.session.heard_at < limit]
        for node in self._nodes:
            threading.Thread(target=node.session.send, args=({"kind": "kill"},), daemon=True).start()
        # Never with a signal that it can handle: the pdsh runner would end every DeepSpeed job on all hosts.
        if self._launcher.poll() is None:
            os.killpg(self._launcher.pid, signal.SIGKILL)
            self._launcher.wait()
        unreached = [node.name for node in self._nodes if node not in reached and node.state != "done"]
        self._kill_over_ssh(unreached)
        deadline = time.monotonic() + _KILL_SECONDS
        while any(node.is_connected for node in reached) and time.monotonic() < deadline:
            self._read_inbox(_TURN_SECONDS)
        self._kill_over_ssh([node.name for node in reached if node.is_connected])
        kill_processes(self._membership.launch_id)

    def _kill_over_ssh(self, hosts: Sequence[str]) -> None:
        if self._ssh is not None:
            kill_over_ssh(self._ssh, hosts, self._membership.launch_id, seconds=_KILL_SECONDS)

    def _write_hosts(self) -> None:
        hosts = [{"name": node.name, "ranks": list(node.ranks), "state": node.state} for node in self._nodes]
        with contextlib.suppress(OSError):
            write_json(self._dir.hosts, {"hosts": hosts, "output_dir": self._folder_text})
