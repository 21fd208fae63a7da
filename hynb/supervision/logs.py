"""The last lines of what the launcher and the ranks of one launch have written."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from pathlib import Path

from hynb.runs import LOG_BYTES, RunDir

_LINES = 8
_TAIL_BYTES = 100_000


class LaunchLogs:
    """The logs of the launch that begins now; an earlier run of the folder may have left its own there."""

    def __init__(self, run_dir: RunDir) -> None:
        self._dir = run_dir
        self._launcher_start = run_dir.launcher_log.stat().st_size
        self._started_at = time.time()

    def rank_tail(self, ranks: Iterable[int]) -> str:
        """The last lines of the first of these ranks that has written any."""
        for path in (self._dir.rank_log(rank) for rank in ranks):
            if path is not None and path.stat().st_mtime >= self._started_at and (tail := _tail(path)):
                return tail
        return ""

    def launcher_tail(self) -> str:
        """The last lines of the launcher."""
        return "\n".join([line for line in self._launcher_lines() if line.strip()][-_LINES:])

    def launcher_lines_of(self, host: str, pattern: str) -> str:
        """The last lines that pdsh printed for one host, if one of them matches the pattern; else empty."""
        lines = [line for line in self._launcher_lines() if re.match(rf"(pdsh@\S+: )?{re.escape(host)}: ", line)]
        if not any(re.search(pattern, line) for line in lines):
            return ""
        return "\n".join(lines[-_LINES:])

    def _launcher_lines(self) -> list[str]:
        with self._dir.launcher_log.open("rb") as file:
            file.seek(self._launcher_start)
            return file.read().decode(errors="replace").splitlines()


def append_to_log(path: Path, data: bytes, *, limit_bytes: int = LOG_BYTES) -> None:
    """Adds what another host has sent of a log; like the rank's own file it begins anew once it is large.

    Args:
        limit_bytes: what a file may hold; what it held until then is kept beside it as `.1`.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("ab") as file:
        file.write(data)
        size = file.tell()
    if size >= limit_bytes and data.endswith((b"\n", b"\r")):
        path.replace(path.with_name(f"{path.name}.1"))
        # An earlier launch of the folder may have left a log of the same rank, which would be taken for the newest.
        path.touch()


def _tail(path: Path) -> str:
    """The last lines of a file, of a progress bar its last state."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join([line for line in lines if line.strip()][-_LINES:])
