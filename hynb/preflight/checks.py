"""What a preflight makes of each host's facts: a cell a check, and for a red one the command that mends it."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hynb.cluster import UNREADABLE, Ssh, parse_gpus, sshd_line
from hynb.config import Config
from hynb.preflight.report import Cell, Known, Target, ranks_text
from hynb.supervision import CODE

# What an environment is made from.
_CHECKOUT = ("hynb", "pyproject.toml", "requirements.lock", "Makefile", "README.md")
_CLOCK_SECONDS = 2.0
_GB = 1e9
_MEMORY_BYTES = 2 * _GB
_SHM_BYTES = {"cpu": 16e6, "gpu": 512e6}
_DISK_BYTES = 1 * _GB
_CACHE_BYTES = 0.2 * _GB
# A GPU of which more than this is taken has somebody else's job on it.
_TAKEN_SHARE = 0.1
# A full checkpoint: weights twice, and 12 bytes a parameter of optimizer state, against 2 bytes a weight.
_CHECKPOINT_FACTOR = 8


def way_open(target: Target) -> list[Cell]:
    """The cells of a host that answered."""
    if target.local and not target.by_ssh:
        texts = dict.fromkeys(("name", "port", "host key", "login"), "this machine")
    else:
        texts = {"name": target.address, "port": str(target.port), "host key": "known", "login": "key accepted"}
    return [Cell(host=target.host.name, check=check, state="ok", text=text) for check, text in texts.items()]


def way_closed(target: Target, problem: str, ssh: Ssh, unreachable: str) -> list[Cell]:
    """The cells of a host that can't be logged in on: how far the way to it is open, and what opens the rest.

    Args:
        problem: what ssh said, in words.
        unreachable: why its port doesn't answer; empty when it does.
    """
    name = target.host.name
    there = "" if target.local else name
    problem = problem.removeprefix(f"{name}: ")

    def cells(*states: tuple[str, str, str, str, str]) -> list[Cell]:
        keys = ("check", "state", "text", "mend", "mend_on")
        return [Cell(host=name, **dict(zip(keys, state, strict=True))) for state in states]

    resolved = ("name", "ok", target.address, "", "")
    listening = ("port", "ok", str(target.port), "", "")
    if not target.address:
        shown = f"echo 'ADDRESS {name}' >> /etc/hosts"
        return cells(("name", "bad", "can't be resolved: give its address", shown, ""))
    if unreachable:
        refused = "refused" in unreachable
        command = sshd_line(target.port) if refused else f"ping -c 3 {target.address}"
        return cells(
            resolved, ("port", "bad", f"{target.port}: {unreachable.lower()}", command, there if refused else "")
        )
    if "another one than the one that is known" in problem:
        forget = problem.split("`")[1]
        mend = f"{forget} && hynb hosts trust {name}{ssh.folder}"
        return cells(resolved, listening, ("host key", "bad", "has changed: ask its administrator", mend, ""))
    if "host key isn't known" in problem:
        mend = f"hynb hosts trust {name}{ssh.folder}"
        return cells(resolved, listening, ("host key", "bad", "isn't known yet", mend, ""))
    known = ("host key", "ok", "known", "", "")
    if "accepts none of our keys" in problem:
        mend = f"hynb hosts install-key {name}{ssh.folder}"
        return cells(resolved, listening, known, ("login", "bad", "accepts none of our keys", mend, ""))
    return cells(resolved, listening, ("login", "bad", problem, ssh.shown(name).replace("ssh", "ssh -v", 1), ""))


def same_machines(targets: Sequence[Target]) -> list[Cell]:
    """The cells of hosts that are another listed one by another name: its GPUs would be given out twice."""
    seen: dict[str, str] = {}
    found = []
    for target in targets:
        place = "this machine" if target.local else f"{target.address} port {target.port}" if target.address else ""
        if place in seen:
            text = f"is {seen[place]} by another name ({place}): list it once"
            found.append(Cell(host=target.host.name, check="name", state="bad", text=text))
        elif place:
            seen[place] = target.host.name
    return found


def no_python(target: Target, said: str, python: str, *, no_code: Ssh | None) -> list[Cell]:
    """The cells of a host that answered, but not from this environment's Python.

    Args:
        no_code: how the code is copied there, where that lacks too; None where it is there.
    """
    text = f"{python} doesn't run there: {said}"
    mend = f"cd {shlex.quote(str(CODE))} && make .venv"
    bad = Cell(host=target.host.name, check="python", state="bad", text=text, mend=mend, mend_on=target.host.name)
    sources = [CODE / name for name in _CHECKOUT]
    if no_code is None or not all(path.exists() for path in sources):
        return [*way_open(target), bad]
    copy = _rsync(target, no_code, [str(path) for path in sources], f"{CODE}/", ["--exclude=__pycache__"])
    lacks = Cell(host=target.host.name, check="code", state="bad", text=f"no {CODE / 'hynb'}", mend=copy)
    return [*way_open(target), bad, lacks]


def compare(target: Target, known: Known) -> list[Cell]:
    """Every check of a host that has told its facts."""
    if target.facts is None:
        return []
    found = [
        _clock(target),
        _python(target, known),
        _versions(target, known),
        _gpus(target, known),
        *_memory(target),
        *_disks(target, known),
        *_same_files(target, known),
        _output_dir(target, known),
        _master_port(target, known),
        _network(target, known),
        *_logins(target, known),
    ]
    return [cell for cell in found if cell is not None]


def collective_cell(host: str, measured: dict[str, Any] | None, failed: str, hostfile: str | None) -> Cell:
    """How the small all-reduce went on a host."""
    if measured is not None and measured["right"] and not failed:
        return Cell(host=host, check="all-reduce", state="ok", text=ranks_text(measured["ranks"]))
    text = failed or ("the sum is wrong" if measured else "the first host's ranks ended without a result")
    hosts = ["--hostfile", hostfile] if hostfile else []
    mend = "NCCL_DEBUG=INFO " + shlex.join([str(Path(sys.executable).with_name("hynb")), "preflight", *hosts])
    return Cell(host=host, check="all-reduce", state="bad", text=text[:300], mend=mend)


def interface_of(target: Target, config: Config) -> str | None:
    """The network interface by which a host reaches the others; None on one host."""
    if config.network_interface:
        return config.network_interface
    sources = {source for source in (target.facts or {}).get("route", {}).values() if source}
    for name, addresses in (target.facts or {}).get("interfaces", {}).items():
        if name != "lo" and sources & set(addresses):
            return name
    return None


def _cell(target: Target, check: str, problem: str, text: str, mend: str = "", *, there: bool = False) -> Cell:
    """A red cell with the problem, or a green one with the text."""
    name = target.host.name
    if not problem:
        return Cell(host=name, check=check, state="ok", text=text)
    mend_on = name if there and not target.local else ""
    return Cell(host=name, check=check, state="bad", text=problem, mend=mend, mend_on=mend_on)


def _clock(target: Target) -> Cell:
    # Its clock was read at some moment between asking and answering; what it did before took time, too.
    ahead = target.facts["time"] - target.answered
    behind = target.asked + target.facts["taken_seconds"] - target.facts["time"]
    off = ahead if ahead > 0 else -behind if behind > 0 else 0.0
    problem = (
        f"{off:+.1f} s off: heartbeats and logs of the hosts would not agree" if abs(off) > _CLOCK_SECONDS else ""
    )
    return _cell(target, "clock", problem, "right", "chronyc makestep || ntpdate -u pool.ntp.org", there=True)


def _python(target: Target, known: Known) -> Cell:
    here, there = known.reference["python"], target.facts["python"]
    problem = f"{there}, and {here} here" if here != there else ""
    return _cell(target, "python", problem, there, f"cd {shlex.quote(str(CODE))} && make clean .venv", there=True)


def _versions(target: Target, known: Known) -> Cell:
    ours, theirs = (facts["versions"] | facts["cuda"] for facts in (known.reference, target.facts))
    different = {name: (theirs.get(name), value) for name, value in ours.items() if theirs.get(name) != value}
    drivers = [
        {gpu.driver for gpu in parse_gpus(facts["gpus"], facts["cuda_visible_devices"])}
        for facts in (known.reference, target.facts)
    ]
    problem = "; ".join(f"{name} {there}, and {here} here" for name, (there, here) in different.items())
    ours_by_pip = {name for name, here in known.reference["versions"].items() if here != "not installed"} - {"hynb"}
    packages = [f"{name}=={here}" for name, (_, here) in different.items() if name in ours_by_pip]
    mend = shlex.join([sys.executable, "-m", "pip", "install", *packages])
    if not packages:
        # The same torch built for another CUDA, or this package itself.
        mend = f"cd {shlex.quote(str(CODE))} && make clean .venv"
    if not problem and all(drivers) and drivers[0] != drivers[1]:
        problem = f"driver {', '.join(sorted(drivers[1]))}, and {', '.join(sorted(drivers[0]))} here"
        mend = "apt-get install --only-upgrade 'nvidia-driver-*'"
    return _cell(target, "versions", problem, f"torch {theirs['torch']}", mend, there=True)


def _gpus(target: Target, known: Known) -> Cell:
    gpus = parse_gpus(target.facts["gpus"], target.facts["cuda_visible_devices"])
    host = target.host
    needed = max(host.slot_ids) + 1 if host.slot_ids else host.slots
    path = known.config.hostfile

    def fewer(count: int) -> str:
        # As a line of its own, or as ip:8 among others.
        name = rf"(^|[,[:space:]])(\[?{re.escape(host.name)}\]?)([[:space:]]+slots=|:)"
        line = shlex.quote(rf"s/{name}[0-9]+/\1\2\3{count}/")
        return f"sed -i -E {line} {shlex.quote(path)}" if path else ""

    if not gpus:
        others = [t.host.name for t in known.targets if t.facts and t.facts["gpus"]]
        if others:
            return _cell(target, "GPUs", f"none, and {others[0]} has some", "", "nvidia-smi", there=True)
        cores = target.facts["cpu_cores"]
        problem = f"{needed} slots, and {cores} CPU cores: a rank takes one at least" if needed > cores else ""
        return _cell(target, "GPUs", problem, f"none: {ranks_text(needed)} on {cores} CPU cores", fewer(cores))
    if needed > len(gpus):
        return _cell(target, "GPUs", f"{needed} slots, and {len(gpus)} GPUs", "", fewer(len(gpus)))
    chosen = [gpus[number] for number in host.slot_ids or range(host.slots)]
    taken = [g for g in chosen if g.memory_bytes and 1 - g.free_bytes / g.memory_bytes > _TAKEN_SHARE]
    problem = ", ".join(
        f"GPU {g.index}: {(g.memory_bytes - g.free_bytes) / _GB:.0f} of {g.memory_bytes / _GB:.0f} GB taken"
        for g in taken
    )
    return _cell(target, "GPUs", problem, f"{len(gpus)} × {gpus[0].name}", "nvidia-smi", there=True)


def _memory(target: Target) -> list[Cell]:
    facts = target.facts
    free, kind = facts["memory_free_bytes"], "gpu" if facts["gpus"] else "cpu"
    problem = f"{free / _GB:.1f} GB free" if free < _MEMORY_BYTES else ""
    text = f"{free / _GB:.0f} of {facts['memory_bytes'] / _GB:.0f} GB free"
    size = facts["shm"]["free"]
    wanted = _SHM_BYTES[kind]
    small = f"/dev/shm: {size / 1e6:.0f} MB free, {wanted / 1e6:.0f} MB needed" if size < wanted else ""
    command = "mount -o remount,size=8G /dev/shm"
    return [
        _cell(target, "memory", problem, text, "ps aux --sort=-rss | head", there=True),
        _cell(target, "shared memory", small, f"{size / _GB:.1f} GB free", command, there=True),
    ]


def _disks(target: Target, known: Known) -> list[Cell]:
    config, found = known.config, target.facts["output_disk"]
    needed = _DISK_BYTES
    if config.model_name_or_path and not config.use_lora:
        weights = sum(path.stat().st_size for path in Path(config.model_name_or_path).glob("*.safetensors"))
        needed = max(needed, _CHECKPOINT_FACTOR * weights / len(known.targets))
    problem = ""
    if not found["writable"]:
        problem = f"{found['place']} can't be written"
    elif found["free"] < needed:
        problem = f"{found['free'] / _GB:.2g} GB free at output_dir, a checkpoint takes {needed / _GB:.2g} GB"
    look = f"du -xh --max-depth=2 {shlex.quote(found['place'])} | sort -h | tail"
    cache = target.facts["cache_disk"]
    full = f"{cache['free'] / _GB:.2g} GB free for the cache" if cache["free"] < _CACHE_BYTES else ""
    free = f"{found['free'] / _GB:.0f} GB free"
    clean = f"du -xh --max-depth=2 {shlex.quote(cache['place'])} | sort -h | tail"
    return [
        _cell(target, "disk", problem, free, look, there=True),
        _cell(target, "cache", full, f"{cache['free'] / _GB:.0f} GB free", clean, there=True),
    ]


def _same_files(target: Target, known: Known) -> list[Cell]:
    config, ours, theirs = known.config, known.reference, target.facts
    code = str(CODE / "hynb")
    problem = _difference(theirs["code"], ours["code"], code)
    delete = ["--delete", "--exclude=__pycache__"]
    found = [_cell(target, "code", problem, "the same", _rsync(target, known.ssh, [code + "/"], code + "/", delete))]
    if config.model_name_or_path:
        model = str(Path(config.model_name_or_path).expanduser().absolute())
        problem, mend = (
            _difference(theirs["model"], ours["model"], model),
            _rsync(target, known.ssh, [model + "/"], model + "/"),
        )
        if ours["model"] is None:
            problem, mend = f"no {model} with a config.json" + ("" if target.local else " on this machine either"), ""
        found.append(_cell(target, "model", problem, "the same", mend))
    if known.data:
        wrong = {path: _difference(theirs["data"][path], ours["data"][path], path) for path in known.data}
        wrong = {path: text for path, text in wrong.items() if text}
        problem = ", ".join(text if path in text else f"{path} {text}" for path, text in wrong.items())
        mend = " && ".join(_rsync(target, known.ssh, [path], path) for path in wrong)
        found.append(_cell(target, "data", problem, "the same", mend))
    return found


def _difference(theirs: str | None, ours: str | None, path: str) -> str:
    """What is wrong with a host's file or folder against this machine's; empty when nothing is."""
    if theirs is not None and theirs.startswith(UNREADABLE):
        return f"{path} {theirs}"
    return "" if theirs == ours else "differs from here" if theirs else f"no {path}"


def _rsync(target: Target, ssh: Ssh, sources: Sequence[str], place: str, options: Sequence[str] = ()) -> str:
    shell = shlex.join(["ssh", *ssh.file])
    name = f"[{target.host.name}]" if ":" in target.host.name else target.host.name
    return shlex.join(
        ["rsync", "-a", "--mkpath", "--info=progress2", *options, "-e", shell, *sources, f"{name}:{place}"]
    )


def _output_dir(target: Target, known: Known) -> Cell | None:
    if len(known.targets) == 1:
        return None
    text = "shared with this host" if target.facts["sees_token"] else "a folder of its own"
    return _cell(target, "output_dir", "", "this host's" if target.local else text)


def _master_port(target: Target, known: Known) -> Cell | None:
    if known.port_taken and target.local:
        free = known.port + 1 if known.port < 65535 else 29500
        return _cell(
            target, "master port", f"{known.port} is taken: {known.port_taken}", "", f"--set master_port={free}"
        )
    failed = target.facts["connects"].get("master")
    if failed is None or known.port_taken:
        return _cell(target, "master port", "", "free") if target.local else None
    problem = f"{known.port} of this machine can't be reached: {failed}" if failed else ""
    allow = f"iptables -I INPUT -s {target.address} -j ACCEPT"
    return _cell(target, "master port", problem, "reached", allow)


def _network(target: Target, known: Known) -> Cell | None:
    others = [other for other in known.targets if other is not target and other.address]
    if not others:
        return None
    wanted, facts = known.config.network_interface, target.facts
    blocked = [other.host.name for other in others if not facts["route"].get(other.address)]
    if blocked:
        return _cell(target, "network", f"no way leads to {', '.join(blocked)}", "", "ip route", there=True)
    sources = {facts["route"][other.address] for other in others}
    right = [name for name, addresses in facts["interfaces"].items() if sources & set(addresses)]
    if wanted and wanted not in right:
        has = "reaches none of them" if wanted in facts["interfaces"] else "isn't there"
        problem = f"{wanted} {has}: {', '.join(right) or 'another one'} leads to the other hosts"
        return _cell(target, "network", problem, "", f"--set network_interface={right[0] if right else 'auto'}")
    return _cell(target, "network", "", f"{right[0] if right else '?'} {min(sources)}")


def _logins(target: Target, known: Known) -> list[Cell]:
    failed = {name: said for name, said in target.facts["logins"].items() if said}
    if not target.facts["logins"]:
        return []
    problem = "; ".join(f"can't log in on {name}: {said}" for name, said in failed.items())
    return [_cell(target, "hosts' logins", problem, "all", f"hynb hosts exchange{known.ssh.folder}")]
