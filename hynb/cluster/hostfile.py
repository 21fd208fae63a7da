"""Hosts and their slots: DeepSpeed's hostfile or upstream's NODE_IP_LIST is parsed, checked, filtered and written.

NODE_IP_LIST is a variable of upstream's training guide, in the form `ip:8,ip:8`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hynb.errors import ClusterError
from hynb.files import replace_text

_FILTER = re.compile(r"(?:\[(?P<bracketed>[^\]]+)\]|(?P<name>[^:\[\]\s]+))(?::(?P<slots>\d{1,6}(?:,\d{1,6})*))?")
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")


@dataclass(kw_only=True, frozen=True)
class Host:
    """A machine and its number of ranks.

    Args:
        slot_ids: indices of its GPUs where include or exclude selected some; None for the first `slots`.
    """

    name: str
    slots: int
    slot_ids: tuple[int, ...] | None = None


class ClusterDir:
    """Names of the files in a cluster's folder; creates nothing."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder).expanduser().absolute()
        self.hostfile = self.path / "hostfile"
        self.ssh_config = self.path / "ssh_config"
        self.known_hosts = self.path / "known_hosts"
        self.preflight = self.path / "preflight.json"


def parse(text: str, *, source: str = "hostfile") -> list[Host]:
    """The hosts in `name slots=8` lines or in `ip:8,ip:8`; comments and blank lines are ignored.

    Args:
        source: what messages call the text, before the line number.

    Raises:
        ClusterError: every wrong line, or no host.
    """
    hosts: list[Host] = []
    problems: list[str] = []
    for number, entry in _entries(text):
        where = f"{source}:{number}"
        try:
            host = _parse_entry(entry)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        if any(host.name == earlier.name for earlier in hosts):
            problems.append(f"{where}: {host.name} is listed twice; list it once with all of its slots")
        else:
            hosts.append(host)
    if not hosts and not problems:
        problems.append(f"{source}: names no host; write a line such as `10.0.0.1 slots=8`")
    if problems:
        raise ClusterError(problems)
    return hosts


def read(path: str | Path) -> list[Host]:
    """The hosts of a hostfile.

    Raises:
        ClusterError: the file is missing or unreadable, or a line is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"hostfile = {path}: cannot be read: {error}") from None
    return parse(text, source=str(path))


def named(text: str) -> list[Host]:
    """The hosts of a hostfile's path, or of `ip:8,ip:8`.

    Raises:
        ClusterError: the file cannot be read, or an entry is wrong.
    """
    try:
        is_file = Path(text).is_file()
    except (OSError, ValueError):
        # A long list of hosts is longer than a file name may be.
        is_file = False
    if is_file or ("/" in text and "," not in text and "=" not in text):
        return read(text)
    return parse(text, source="hosts")


def to_text(hosts: Sequence[Host]) -> str:
    """The lines that DeepSpeed and `parse` read."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)


def write(path: str | Path, hosts: Sequence[Host]) -> None:
    """Replaces a hostfile atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, to_text(hosts))


def local(slots: int) -> list[Host]:
    """This machine alone."""
    return [Host(name="localhost", slots=slots)]


def ssh_config_of(path: str | Path) -> Path | None:
    """The OpenSSH configuration of a hostfile: `ssh_config` in the same folder, if it exists."""
    beside = ClusterDir(Path(path).expanduser().absolute().parent).ssh_config
    return beside if beside.is_file() else None


def select(hosts: Sequence[Host], *, include: str | None = None, exclude: str | None = None) -> list[Host]:
    """The hosts and slots that a filter of DeepSpeed's leaves, in the order of `hosts`.

    Args:
        include: `worker-0:0,2@worker-1`: these hosts, of the first only slots 0 and 2; an IPv6 address in brackets.
        exclude: in the same form; give only one of the two.

    Raises:
        ClusterError: every part that names no existing host or slot; both filters given; nothing left.
    """
    if include and exclude:
        raise ClusterError(f"include = {include} and exclude = {exclude}: give only one of the two")
    if include:
        parameter, text = "include", include
    elif exclude:
        parameter, text = "exclude", exclude
    else:
        return list(hosts)
    named, problems = _parse_filter(hosts, parameter, text)
    if problems:
        raise ClusterError(problems)
    left = []
    for host in hosts:
        all_slots = set(range(host.slots))
        if parameter == "include":
            kept = all_slots & named.get(host.name, set())
        else:
            kept = all_slots - named.get(host.name, set())
        if kept:
            ids = None if kept == all_slots else tuple(sorted(kept))
            left.append(Host(name=host.name, slots=len(kept), slot_ids=ids))
    if not left:
        raise ClusterError(f"{parameter} = {text}: no slot of any host is left")
    return left


def _parse_filter(hosts: Sequence[Host], parameter: str, text: str) -> tuple[dict[str, set[int]], list[str]]:
    """The slots in a filter by host name, and what is wrong with it."""
    slots_of = {host.name: host.slots for host in hosts}
    named: dict[str, set[int]] = {}
    problems = []
    for word in filter(None, (part.strip() for part in text.split("@"))):
        match = _FILTER.fullmatch(word)
        if match is None:
            problems.append(f"{parameter} = {text}: {word!r} is not a host with slots; write `worker-0:0,2@worker-1`")
            continue
        name = match["bracketed"] or match["name"]
        if name not in slots_of:
            problems.append(f"{parameter} = {text}: no host is named {name}; there are {', '.join(slots_of)}")
            continue
        ids = {int(number) for number in match["slots"].split(",")} if match["slots"] else set(range(slots_of[name]))
        if beyond := sorted(number for number in ids if number >= slots_of[name]):
            last = slots_of[name] - 1
            problems.append(f"{parameter} = {text}: {name} has slots 0 to {last}, not {', '.join(map(str, beyond))}")
        named.setdefault(name, set()).update(ids)
    return named, problems


def _entries(text: str) -> Iterator[tuple[int, str]]:
    """Line number and text of each host's entry."""
    for number, line in enumerate(text.splitlines(), 1):
        for entry in line.partition("#")[0].split(","):
            if entry.strip():
                yield number, entry.strip()


def _parse_entry(entry: str) -> Host:
    """The host of `name slots=8` or `ip:8`.

    Raises:
        ValueError: what is wrong with the entry.
    """
    words = entry.split()
    if len(words) == 1:
        # Upstream's form, ip:8, with an IPv6 address in brackets.
        name, colon, slots = words[0].rpartition(":")
        if not colon or (":" in name and not name.startswith("[")):
            raise ValueError(f"{entry!r} names no slots; write `{entry} slots=8`")
    elif len(words) == 2 and words[1].startswith("slots="):
        name, slots = words[0], words[1].removeprefix("slots=")
    else:
        raise ValueError(f"{entry!r} is not a host; write `10.0.0.1 slots=8`")
    name = name.removeprefix("[").removesuffix("]")
    if not re.fullmatch(r"\d{1,6}", slots) or int(slots) < 1:
        raise ValueError(f"{entry!r}: slots must be a whole number, 1 or more")
    if ":" in name:
        address, percent, interface = name.partition("%")
        try:
            ipaddress.IPv6Address(address)
        except ValueError:
            raise ValueError(f"{name!r} is not an IPv6 address") from None
        if percent and not _NAME.fullmatch(interface):
            raise ValueError(f"{name!r}: {interface!r} is not a network interface")
    elif not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a host name or address")
    return Host(name=name, slots=int(slots))
