"""Hosts and their slots: a hostfile's lines or the guide's NODE_IP_LIST, read, checked, filtered and written."""

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
    """A machine and how many ranks it takes.

    Args:
        slot_ids: which of its GPUs, where include or exclude chose some; None for the first `slots`.
    """

    name: str
    slots: int
    slot_ids: tuple[int, ...] | None = None


class ClusterDir:
    """Names of the files in a cluster's folder; makes nothing."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder).expanduser().absolute()
        self.hostfile = self.path / "hostfile"
        self.ssh_config = self.path / "ssh_config"
        self.known_hosts = self.path / "known_hosts"
        self.preflight = self.path / "preflight.json"


def parse(text: str, *, source: str = "hostfile") -> list[Host]:
    """Hosts from `name slots=8` lines or from `ip:8,ip:8`; comments and blank lines are passed over.

    Args:
        source: named in messages, with the line.

    Raises:
        ClusterError: every line that is wrong, at once.
    """
    hosts: list[Host] = []
    problems: list[str] = []
    for number, words in _entries(text):
        where = f"{source}:{number}"
        try:
            host = _host(words)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        if any(host.name == earlier.name for earlier in hosts):
            problems.append(f"{where}: {host.name} is listed twice; give its slots once")
        else:
            hosts.append(host)
    if not hosts and not problems:
        problems.append(f"{source}: names no host; write a line such as `10.0.0.1 slots=8`")
    if problems:
        raise ClusterError(problems)
    return hosts


def read(path: str | Path) -> list[Host]:
    """The hosts of a file.

    Raises:
        ClusterError: the file is absent, or a line is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"hostfile = {path}: cannot be read: {error}") from None
    return parse(text, source=str(path))


def named(text: str) -> list[Host]:
    """The hosts that a person names: a hostfile's path, or `ip:8,ip:8` itself.

    Raises:
        ClusterError: the file can't be read, or a word or line is wrong.
    """
    try:
        is_file = Path(text).is_file()
    except (OSError, ValueError):
        # A long list of hosts is longer than a file's name may be.
        is_file = False
    if is_file or ("/" in text and "," not in text and "=" not in text):
        return read(text)
    return parse(text, source="hosts")


def to_text(hosts: Sequence[Host]) -> str:
    """The lines that DeepSpeed reads, and `parse` reads back."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)


def write(path: str | Path, hosts: Sequence[Host]) -> None:
    """Replaces a hostfile at once."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, to_text(hosts))


def local(slots: int) -> list[Host]:
    """This machine alone."""
    return [Host(name="localhost", slots=slots)]


def ssh_config_of(path: str | Path) -> Path | None:
    """The OpenSSH configuration that belongs to a hostfile: `ssh_config` beside it, if there is one."""
    beside = ClusterDir(Path(path).expanduser().absolute().parent).ssh_config
    return beside if beside.is_file() else None


def select(hosts: Sequence[Host], *, include: str | None = None, exclude: str | None = None) -> list[Host]:
    """The hosts and slots that a filter leaves, in the order of the hosts.

    Args:
        include: `worker-0:0,2@worker-1`: these hosts, of the first two slots alone; an IPv6 address in brackets.
        exclude: in the same form; give one of the two.

    Raises:
        ClusterError: every word that names no host or slot of these, at once; both given; nothing left.
    """
    if include and exclude:
        raise ClusterError(f"include = {include} and exclude = {exclude}: give one of the two")
    if not include and not exclude:
        return list(hosts)
    parameter, text = ("include", include) if include else ("exclude", exclude)
    named, problems = _filter(hosts, parameter, text)
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


def _filter(hosts: Sequence[Host], parameter: str, text: str) -> tuple[dict[str, set[int]], list[str]]:
    """Slots by host's name as a filter names them, and what is wrong with it."""
    slots_of = {host.name: host.slots for host in hosts}
    named: dict[str, set[int]] = {}
    problems = []
    for word in filter(None, (part.strip() for part in text.split("@"))):
        match = _FILTER.fullmatch(word)
        if match is None:
            problems.append(f"{parameter} = {text}: {word!r} is no host with slots; write `worker-0:0,2@worker-1`")
            continue
        name = match["bracketed"] or match["name"]
        if name not in slots_of:
            problems.append(f"{parameter} = {text}: no host {name}; there are {', '.join(slots_of)}")
            continue
        ids = {int(number) for number in match["slots"].split(",")} if match["slots"] else set(range(slots_of[name]))
        if beyond := sorted(number for number in ids if number >= slots_of[name]):
            last = slots_of[name] - 1
            problems.append(f"{parameter} = {text}: {name} has slots 0 to {last}, no {', '.join(map(str, beyond))}")
        named.setdefault(name, set()).update(ids)
    return named, problems


def _entries(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        for entry in line.partition("#")[0].split(","):
            if entry.strip():
                yield number, entry.strip()


def _host(entry: str) -> Host:
    words = entry.split()
    if len(words) == 1:
        # The guide's form: ip:8, with brackets around an IPv6 address.
        name, colon, slots = words[0].rpartition(":")
        if not colon or (":" in name and not name.startswith("[")):
            raise ValueError(f"{entry!r} names no slots; write `{entry} slots=8`")
    elif len(words) == 2 and words[1].startswith("slots="):
        name, slots = words[0], words[1].removeprefix("slots=")
    else:
        raise ValueError(f"{entry!r} is no host; write `10.0.0.1 slots=8`")
    name = name.removeprefix("[").removesuffix("]")
    if not re.fullmatch(r"\d{1,6}", slots) or int(slots) < 1:
        raise ValueError(f"{entry!r}: slots must be a whole number from 1 on")
    if ":" in name:
        try:
            ipaddress.IPv6Address(name.partition("%")[0])
        except ValueError:
            raise ValueError(f"{name!r} is no IPv6 address") from None
    elif not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no host name or address")
    return Host(name=name, slots=int(slots))
