"""The result of a preflight: one cell per check and host, as a table, as text and as JSON."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal

from hynb.preflight.collective import Measurement

# In the order in which they depend on each other, and in which a table shows them.
CHECKS = (
    *("name", "port", "host key", "login", "clock", "python", "versions", "GPUs", "compiler", "memory"),
    *("shared memory", "locked memory", "disk", "cache", "code", "model", "data", "output_dir", "master port"),
    *("network", "hosts' logins", "all-reduce"),
)
_MARKS = {"ok": "✓", "bad": "✗", "unknown": "–"}
_COLOURS = {"ok": "\x1b[32m", "bad": "\x1b[31m"}
_RESET = "\x1b[0m"
# Pairs of hosts up to this number are shown one by one; of more, the slowest.
_SHOWN_PAIRS, _SLOWEST_PAIRS = 15, 5
_CHECK_WIDTH, _LINE_WIDTH, _MIN_CELL_WIDTH = 15, 100, 24


@dataclass(kw_only=True, frozen=True)
class Cell:
    """The result of one check on one host.

    Args:
        state: `unknown` where an earlier check failed.
        fix: a command that fixes the problem; empty when there is no problem, or no command for it.
        fix_host: the host on which to run it; empty for this machine.
    """

    host: str
    check: str
    state: Literal["ok", "bad", "unknown"]
    text: str
    fix: str = ""
    fix_host: str = ""

    @property
    def where(self) -> str:
        """Where to use the fix, as words to put before it."""
        if self.fix.startswith("--set "):
            return "add to the command, or choose it in the form"
        return f"on {self.fix_host or 'this machine'}"


@dataclass(kw_only=True)
class Report:
    """What a preflight found.

    Args:
        collective: measurements of the all-reduce; None when it was not run.
        seconds: duration of the preflight.
        made_at: seconds since the epoch.
    """

    hosts: list[str]
    cells: list[Cell]
    collective: Measurement | None
    seconds: float
    made_at: float = field(default_factory=time.time)

    @property
    def bad(self) -> list[Cell]:
        """The failed checks: a run cannot start with them."""
        return [cell for cell in self.cells if cell.state == "bad"]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.bad

    def cell(self, host: str, check: str) -> Cell:
        """The result of one check on one host."""
        return next(item for item in self.cells if (item.host, item.check) == (host, check))

    def rows(self) -> list[list[Cell]]:
        """One row per check, with one cell per host."""
        checks = [check for check in CHECKS if any(cell.check == check for cell in self.cells)]
        return [[self.cell(host, check) for host in self.hosts] for check in checks]

    def to_json(self) -> dict[str, Any]:
        """The whole report in plain values."""
        return {
            "v": 2,
            "ok": self.ok,
            "hosts": self.hosts,
            "made_at": self.made_at,
            "seconds": self.seconds,
            "cells": [vars(cell) for cell in self.cells],
            "collective": self.collective,
        }

    def pair_lines(self) -> list[str]:
        """The measured speeds: all-reduce, ring, each pair or the slowest ones; empty for a single rank."""
        found = self.collective
        if found is None or found["ranks"] == 1:
            return []
        megabytes = found["message_bytes"] / (1 << 20)
        lines = [
            f"all-reduce over {ranks_text(found['ranks'])}: {found['bytes_per_second'] / 1e9:.3g} GB/s "
            f"with messages of {megabytes:.0f} MB"
        ]
        if speed := found["ring_bytes_per_second"]:
            lines.append(f"each host to the next one, all at once: {speed / 1e9:.3g} GB/s")
        pairs = found["pairs"]
        if len(pairs) > _SHOWN_PAIRS:
            pairs = sorted(pairs, key=lambda pair: pair["bytes_per_second"])
            median = pairs[len(pairs) // 2]["bytes_per_second"]
            lines.append(f"{len(pairs)} pairs of hosts: median {median / 1e9:.3g} GB/s; the slowest:")
            pairs = pairs[:_SLOWEST_PAIRS]
        for pair in pairs:
            names = " – ".join(self.hosts[node] for node in pair["nodes"])
            latency_us = pair["latency_seconds"] * 1e6
            lines.append(f"{names}: {pair['bytes_per_second'] / 1e9:.3g} GB/s, {latency_us:,.0f} µs one way")
        return lines

    def to_text(self, *, colour: bool = False) -> str:
        """The table for a terminal, and below it the fix for each failed check."""
        marks = dict(_MARKS)
        if colour:
            marks |= {state: f"{escape}{_MARKS[state]}{_RESET}" for state, escape in _COLOURS.items()}
        width = max(_MIN_CELL_WIDTH, (_LINE_WIDTH - _CHECK_WIDTH) // len(self.hosts))
        lines = [" " * _CHECK_WIDTH + "  ".join(f"{name:{width}}" for name in self.hosts)]
        for row in self.rows():
            cells = (f"{marks[cell.state]} {cell.text[: width - 3]:{width - 2}}" for cell in row)
            lines.append(f"{row[0].check:{_CHECK_WIDTH}}" + "  ".join(cells).rstrip())
        lines += ["", *self.pair_lines()]
        for cell in self.bad:
            lines += ["", f"{marks['bad']} {cell.host}, {cell.check}: {cell.text}"]
            if cell.fix:
                lines += [f"  {cell.where}:", f"    {cell.fix}"]
        verdict = "all checks passed" if self.ok else f"{len(self.bad)} failed"
        count = len(self.hosts)
        verdict += f", {count} host{'s' if count != 1 else ''}, {self.seconds:.1f} s"
        return "\n".join([*lines, "", verdict]).lstrip("\n")


def ranks_text(count: int) -> str:
    """A number of ranks in words."""
    return f"{count} rank{'s' if count != 1 else ''}"
