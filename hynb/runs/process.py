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
# Of /proc/PID/stat, counted behind the name, which may hold any character (man 5 proc).
_STATE, _START_TICKS = 0, 19


@dataclass(kw_only=True, frozen=True)
class ProcessId:
    """A process, identified so that a reused pid is not mistaken for it, whatever becomes of the clock.

    Args:
        boot_id: of its host's kernel, since that was started.
        start_ticks: clock ticks between that start and the start of the process.
        create_time: in records of earlier versions instead of these: seconds since the epoch.
    """

    host: str
    pid: int
    boot_id: str | None = None
    start_ticks: int | None = None
    create_time: float | None = None

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """The identity of a running process of this host."""
        _, ticks = _stat(pid)
        return cls(host=socket.gethostname(), pid=pid, boot_id=_this_boot(), start_ticks=ticks)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ProcessId:
        """The identity in a record of a run folder; other keys are those of another version."""
        start = {name: record.get(name) for name in ("boot_id", "start_ticks", "create_time")}
        return cls(host=record["host"], pid=record["pid"], **start)

    def record(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def alive(self) -> bool | None:
        """Whether the process runs; None when it is on another host, where its pid says nothing here."""
        if self.host != socket.gethostname():
            return None
        try:
            state, ticks = _stat(self.pid)
            if self.start_ticks is not None:
                same = (self.boot_id, self.start_ticks) == (_this_boot(), ticks)
            else:
                # psutil derives it from the boot time, which may differ by a clock tick between two calls.
                same = abs(psutil.Process(self.pid).create_time() - (self.create_time or 0.0)) < 1.0
        except (OSError, psutil.Error):
            return False
        return same and state not in ("Z", "X")


def _stat(pid: int) -> tuple[str, int]:
    """The state of a process, as a letter, and its start in clock ticks since the kernel's.

    Raises:
        OSError: there is no such process.
    """
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return fields[_STATE].decode(), int(fields[_START_TICKS])


@functools.cache
def _this_boot() -> str:
    return _BOOT_ID.read_text().strip()
