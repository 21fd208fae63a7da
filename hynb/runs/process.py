"""The identity of a process, by which a run folder names it."""

from __future__ import annotations

import functools
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")
# Of `stat_fields`.
_STATE, _START_TICKS = 0, 19


@dataclass(kw_only=True, frozen=True)
class ProcessId:
    """A process, identified so that a reused pid is not mistaken for it, whatever becomes of the clock.

    Args:
        boot_id: of its host's kernel, since that was started.
        pid_namespace: in which the pid counts; containers of one machine may have one host name.
        start_ticks: clock ticks between that start and the start of the process.
        create_time: in records of earlier versions instead of these: seconds since the epoch.
    """

    host: str
    pid: int
    boot_id: str | None = None
    pid_namespace: int | None = None
    start_ticks: int | None = None
    create_time: float | None = None

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """The identity of a running process of this host."""
        _, ticks = _stat(pid)
        boot_id, pid_namespace = _this_system()
        host = socket.gethostname()
        return cls(host=host, pid=pid, boot_id=boot_id, pid_namespace=pid_namespace, start_ticks=ticks)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ProcessId:
        """The identity in a record of a run folder; other keys are those of another version."""
        start = {name: record.get(name) for name in ("boot_id", "pid_namespace", "start_ticks", "create_time")}
        return cls(host=record["host"], pid=record["pid"], **start)

    def record(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def alive(self) -> bool | None:
        """Whether the process runs; None where its pid says nothing.

        That is on another host, or where the same name belongs to another machine, another container or an earlier
        start of this one.
        """
        boot_id, pid_namespace = _this_system()
        is_elsewhere = self.host != socket.gethostname() or self.boot_id not in (None, boot_id)
        if is_elsewhere or self.pid_namespace not in (None, pid_namespace):
            return None
        try:
            state, ticks = _stat(self.pid)
            if self.start_ticks is not None:
                same = self.start_ticks == ticks
            else:
                # psutil derives it from the boot time, which may differ by a clock tick between two calls.
                same = abs(psutil.Process(self.pid).create_time() - (self.create_time or 0.0)) < 1.0
        except (OSError, psutil.Error):
            return False
        return same and state not in ("Z", "X")


def stat_fields(pid: int) -> list[bytes]:
    """What /proc/PID/stat says of a process, from its third field on, its state (man proc_pid_stat).

    Raises:
        OSError: there is no such process.
    """
    # The name before may hold spaces and brackets.
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()


def _stat(pid: int) -> tuple[str, int]:
    """The state of a process, as a letter, and its start in clock ticks since the kernel's.

    Raises:
        OSError: there is no such process.
    """
    fields = stat_fields(pid)
    return fields[_STATE].decode(), int(fields[_START_TICKS])


@functools.cache
def _this_system() -> tuple[str, int]:
    """The kernel's present start, and the namespace of this process's pids."""
    return _BOOT_ID.read_text().strip(), _PID_NAMESPACE.stat().st_ino
