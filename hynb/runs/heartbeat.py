"""The heartbeat: a file that shows every host that rank 0 is alive, in which phase, and at which step.

A child process of rank 0 writes it. A thread would be silent while anything holds the GIL: code of a model folder, or
a C extension such as DeepSpeed's CPU Adam, whose `adam_update` does not release it (csrc/adam/cpu_adam.cpp).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from hynb.files import write_json

Phase = Literal["starting", "checking data", "compiling", "meeting", "loading", "training", "evaluating", "saving"]
HEARTBEAT_SECONDS = 5.0
# The child ends within milliseconds of the end of its pipe, unless the disk hangs; then nobody waits for it.
_END_SECONDS = 5.0


@dataclass(kw_only=True, frozen=True)
class Beat:
    """The content of a heartbeat file.

    Args:
        progress: how far the phase is, such as "312 of 777 GB, 4.1 GB/s"; empty where nothing is known.
        time: when it was written, in seconds since the epoch, by the clock of the file's disk.
    """

    phase: Phase | None
    global_step: int
    progress: str = ""
    time: float


class Heartbeat:
    """Rewrites a heartbeat file from a child process for as long as this process lives.

    Args:
        path: the file; it is replaced atomically.
        interval_seconds: time between two writes; a new phase is written at once.
    """

    def __init__(self, path: Path, *, interval_seconds: float = HEARTBEAT_SECONDS) -> None:
        self._path = path
        self._interval_seconds = interval_seconds
        self._content: dict[str, Any] = {"phase": "starting", "global_step": 0, "progress": ""}
        self._child = self._start()

    def update(
        self, *, phase: Phase | None = None, global_step: int | None = None, progress: str | None = None
    ) -> None:
        """Changes what the heartbeat contains; what is not given stays, but a new phase begins anew."""
        if phase is not None and phase != self._content["phase"]:
            progress = progress or ""
        given = {"phase": phase, "global_step": global_step, "progress": progress}
        self._content |= {name: value for name, value in given.items() if value is not None}
        if self._child.poll() is not None:
            self._child = self._start()
        self._send()

    def stop(self) -> None:
        """Ends the child; the file stays."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(_END_SECONDS)

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "hynb.runs.heartbeat", str(self._path), str(os.getpid())]
        self._child = subprocess.Popen(
            [*command, str(self._interval_seconds), json.dumps(self._content)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # A Ctrl-C at a terminal is for rank 0 alone: the child ends with it.
            start_new_session=True,
        )
        assert self._child.stdin is not None
        # Training never waits for a child whose disk hangs: what does not fit into the pipe is dropped.
        os.set_blocking(self._child.stdin.fileno(), False)
        return self._child

    def _send(self) -> None:
        assert self._child.stdin is not None
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._child.stdin.fileno(), json.dumps(self._content).encode() + b"\n")


def read_heartbeat(path: Path) -> Beat | None:
    """The last heartbeat; None when there is none. A bare step number, as earlier versions wrote it, is read too."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        written = path.stat().st_mtime
        if type(content) is int:
            return Beat(phase=None, global_step=content, time=written)
        phase, global_step = content["phase"], content["global_step"]
        if type(global_step) is not int or phase not in (None, *get_args(Phase)):
            return None
        return Beat(phase=phase, global_step=global_step, progress=str(content.get("progress", "")), time=written)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def disk_time(folder: Path) -> float:
    """Now, in seconds since the epoch, by the clock that stamps files of a folder: on a network disk, the server's.

    Two hosts' own clocks may differ by more than a heartbeat may be old.
    """
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:
            # On a full disk an empty file has the time of its creation.
            with contextlib.suppress(OSError):
                probe.write(b"\n")
            return os.fstat(probe.fileno()).st_mtime
    except OSError:
        # A folder that may only be read.
        return time.time()


def _beat(path: Path, parent_pid: int, interval_seconds: float, content: dict[str, Any]) -> None:
    """Writes the heartbeat until the parent closes its end of the pipe or is gone."""
    received, due = b"", 0.0
    # A process that the parent forked may hold the pipe open after the parent's end.
    while os.getppid() == parent_pid:
        if time.monotonic() >= due:
            # A disk that is full or unreachable is for rank 0 to report; where it is full, a file's time can be set.
            with contextlib.suppress(OSError):
                try:
                    write_json(path, content)
                except OSError:
                    os.utime(path)
            due = time.monotonic() + interval_seconds
        if not select.select([sys.stdin.fileno()], [], [], max(0.0, due - time.monotonic()))[0]:
            continue
        data = os.read(sys.stdin.fileno(), 1 << 16)
        if not data:
            return
        *lines, received = (received + data).split(b"\n")
        if lines:
            changed = json.loads(lines[-1])
            if changed["phase"] != content["phase"]:
                due = 0.0
            content = changed


if __name__ == "__main__":
    # A scheduler sends it to all processes, and rank 0 goes on to the end of its step.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _beat(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), json.loads(sys.argv[4]))
