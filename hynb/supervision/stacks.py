"""Where each rank's Python code is when a run hangs: written by faulthandler on a signal, collected by the guards."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from hynb.runs import RunDir
from hynb.supervision.connections import Node

# A rank that waited in vain stays so long, and the supervisor waits so long, for the stacks of all ranks.
# Guards answer within about a second.
STACKS_SECONDS = 3.0
_SIGNAL = signal.SIGUSR1
# A rank writes within milliseconds, unless a signal has stopped it or its machine is overloaded.
_WRITE_SECONDS = 1.0
_FRAMES = 4
_FRAME = re.compile(r'  File "(?P<path>[^"]*)", line (?P<line>\d+) in (?P<name>.+)')
# Open for as long as this process lives: faulthandler writes into its descriptor.
_file: TextIO | None = None


def write_stacks_on_signal(registry: Path, rank: int) -> None:
    """Lets the guard have this process write the stacks of all its threads into the registry."""
    global _file
    _file = (registry / f"rank{rank}.stacks").open("w", encoding="utf-8")
    faulthandler.register(_SIGNAL, file=_file, all_threads=True)


def collect_stacks(registry: Path, pids: Mapping[int, int]) -> dict[str, str]:
    """What the ranks of this host write, by rank; empty for one that does not.

    Args:
        pids: of the ranks that live.
    """
    files = {rank: registry / f"rank{rank}.stacks" for rank in pids}
    # Before a rank has its file, the signal would end it.
    asked = {rank: path for rank, path in files.items() if path.exists()}
    sizes = {}
    for rank, path in asked.items():
        sizes[rank] = path.stat().st_size
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[rank], _SIGNAL)
    deadline, before = time.monotonic() + _WRITE_SECONDS, {}
    while time.monotonic() < deadline:
        time.sleep(0.1)
        now = {rank: path.stat().st_size for rank, path in asked.items()}
        if now == before and all(now[rank] > sizes[rank] for rank in asked):
            break
        before = now
    return {str(rank): _from(path, sizes[rank]) for rank, path in asked.items()}


class Stacks:
    """The stacks of all ranks of a run, which its supervisor asks the guards for once, when the run hangs."""

    def __init__(self, run_dir: RunDir, nodes: Sequence[Node]) -> None:
        self._dir = run_dir
        self._nodes = nodes
        self._asked = False
        self._texts: dict[int, str] = {}
        self._missing: set[str] = set()

    def ask(self) -> None:
        """Asks all guards that can be reached, once."""
        if self._asked:
            return
        self._asked = True
        for node in self._nodes:
            if node.state == "joined" and node.is_connected:
                self._missing.add(node.name)
                node.session.send({"kind": "stacks"})

    @property
    def is_complete(self) -> bool:
        """Whether every guard that was asked has answered."""
        return not self._missing

    def add(self, node: Node, message: Mapping[str, Any]) -> None:
        """Takes a guard's answer, and writes what there is so far into the run folder."""
        self._missing.discard(node.name)
        self._texts |= {int(rank): text for rank, text in message["texts"].items()}
        hosts = {rank: node.name for node in self._nodes for rank in node.ranks}
        parts = [
            f"rank {rank} on {hosts[rank]}\n{text or 'wrote nothing within a second: a signal has stopped it?'}\n"
            for rank, text in sorted(self._texts.items())
        ]
        with contextlib.suppress(OSError):
            self._dir.stacks.write_text("\n".join(parts), encoding="utf-8")

    def reason(self, rank: int | None) -> str:
        """What a run's reason says of them: where the rank at fault is, and the file; empty without any."""
        if not any(self._texts.values()):
            return ""
        frames = innermost(self._texts.get(rank, "")) if rank is not None else []
        where = f"\nrank {rank} was in {' < '.join(frames)}" if frames else ""
        return f"{where}\nThe Python stacks of all ranks: {self._dir.stacks}"


def innermost(text: str) -> list[str]:
    """The innermost frames of the main thread, the innermost first, as `function (file:line)`."""
    # CPython lists the oldest thread last.
    main = re.split(r"^(?:Current thread|Thread) .*$", text, flags=re.MULTILINE)[-1]
    found = [_FRAME.match(line) for line in main.splitlines()]
    return [f"{match['name']} ({_short(match['path'])}:{match['line']})" for match in found if match][:_FRAMES]


def _short(path: str) -> str:
    """A source file's path from its package on."""
    return re.sub(r"^.*/(?:site-packages|lib/python3\.\d+)/", "", path)


def _from(path: Path, begin: int) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        file.seek(begin)
        return file.read().strip()
