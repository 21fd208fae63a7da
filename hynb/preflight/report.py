"""What a preflight knows of each host and what it found: targets, cells, report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hynb.cluster import (
    ClusterDir,
    Host,
    Ssh,
)
from hynb.config import Config
from hynb.files import write_json


@dataclass(kw_only=True)
class Target:
    """One host with all that is known of it.

    Args:
        address: by which the others reach it; empty when its name can't be resolved.
        by_ssh: the launcher logs in there, be it this machine.
        asked, answered: time here before and after its facts were asked for.
    """

    host: Host
    local: bool
    address: str
    port: int
    by_ssh: bool = False
    facts: dict[str, Any] | None = None
    asked: float = 0.0
    answered: float = 0.0


@dataclass(kw_only=True)
class Report:
    """What a preflight found.

    Args:
        collective: ranks, bytes_per_second of the all-reduce, and pairs of hosts with latency_seconds and
            bytes_per_second; None when it was not run.
    """

    hosts: list[str]
    cells: list[Cell]
    collective: dict[str, Any] | None
    seconds: float
    made_at: float = field(default_factory=time.time)

    @property
    def bad(self) -> list[Cell]:
        """What keeps a run from starting."""
        return [cell for cell in self.cells if cell.state == "bad"]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.bad

    def cell(self, host: str, check: str) -> Cell:
        """One host's result of one check."""
        return next(item for item in self.cells if (item.host, item.check) == (host, check))

    def rows(self) -> list[list[Cell]]:
        """A row a check, a cell a host."""
        checks = [check for check in CHECKS if any(cell.check == check for cell in self.cells)]
        return [[self.cell(host, check) for host in self.hosts] for check in checks]

    def to_json(self) -> dict[str, Any]:
        """All of it in plain values."""
        cells = [vars(cell) for cell in self.cells]
        known = {"v": 1, "ok": self.ok, "hosts": self.hosts, "made_at": self.made_at, "seconds": self.seconds}
        return known | {"cells": cells, "collective": self.collective}

    def pair_lines(self) -> list[str]:
        """The measured speed between hosts, a line a pair."""
        found = self.collective
        if found is None or found["ranks"] == 1:
            return []
        lines = [f"all-reduce over {ranks_text(found['ranks'])}: {found['bytes_per_second'] / 1e9:.3g} GB/s"]
        for pair in found["pairs"]:
            names = " – ".join(self.hosts[node] for node in pair["nodes"])
            latency = pair["latency_seconds"] * 1e6
            lines.append(f"{names}: {pair['bytes_per_second'] / 1e9:.3g} GB/s, {latency:,.0f} µs one way")
        return lines


def write_report(report: Report, config: Config) -> Path | None:
    """Keeps the report beside the hostfile; None for a run on this machine alone, or where no file can be."""
    if config.hostfile is None:
        return None
    path = ClusterDir(Path(config.hostfile).expanduser().absolute().parent).preflight
    try:
        write_json(path, report.to_json())
    except OSError:
        # Beside a hostfile of an administrator's nobody else may write.
        return None
    return path


def text(report: Report, *, colour: bool = False) -> str:
    """The table for a terminal, and under it what mends each red cell."""
    marks = {"ok": "\x1b[32m✓\x1b[0m", "bad": "\x1b[31m✗\x1b[0m", "unknown": "–"}
    if not colour:
        marks = {"ok": "✓", "bad": "✗", "unknown": "–"}
    width = max(24, (100 - 15) // len(report.hosts))
    lines = [" " * 15 + "  ".join(f"{name:{width}}" for name in report.hosts)]
    for row in report.rows():
        texts = [f"{cell.text[: width - 3]:{width - 2}}" for cell in row]
        marked = (f"{marks[cell.state]} {shown}" for cell, shown in zip(row, texts, strict=True))
        lines.append(f"{row[0].check:15}" + "  ".join(marked).rstrip())
    lines += ["", *report.pair_lines()]
    for cell in report.bad:
        lines += ["", f"{marks['bad']} {cell.host}, {cell.check}: {cell.text}"]
        if cell.mend:
            lines += [f"  {cell.where}:", f"    {cell.mend}"]
    verdict = "all is well" if report.ok else f"{len(report.bad)} red"
    count = len(report.hosts)
    verdict += f", {count} host{'s' if count != 1 else ''}, {report.seconds:.1f} s"
    return "\n".join([*lines, "", verdict]).lstrip("\n")


# In the order in which one thing needs another, and in which a table shows them.
CHECKS = (
    *("name", "port", "host key", "login", "clock", "python", "versions", "GPUs", "memory", "shared memory"),
    *("disk", "cache", "code", "model", "data", "output_dir", "master port", "network", "hosts' logins"),
    "all-reduce",
)


@dataclass(kw_only=True, frozen=True)
class Cell:
    """The result of one check of one host.

    Args:
        state: `unknown` where something before it failed.
        mend: a command that mends it; empty when nothing is wrong or no command can.
        mend_on: the host where it is typed; empty for this machine.
    """

    host: str
    check: str
    state: Literal["ok", "bad", "unknown"]
    text: str
    mend: str = ""
    mend_on: str = ""

    @property
    def where(self) -> str:
        """Where its mend goes, in words before it."""
        if self.mend.startswith("--set "):
            return "add to the command, or choose it in the form"
        return f"on {self.mend_on or 'this machine'}"


def ranks_text(count: int) -> str:
    """A number of ranks in words."""
    return f"{count} rank{'s' if count != 1 else ''}"


@dataclass(kw_only=True, frozen=True)
class Known:
    """What all hosts are compared with.

    Args:
        reference: facts of the launching host.
        port_taken: who listens on the master port already.
    """

    config: Config
    targets: Sequence[Target]
    reference: dict[str, Any]
    ssh: Ssh
    port: int
    port_taken: str
    data: Sequence[str]
