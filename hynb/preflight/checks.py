"""Compares each host's facts with this machine's and with the run's needs: one cell per check, with a fix."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from hynb.cluster import UNREADABLE, Gpu, HostFacts, parse_gpus
from hynb.config import Config
from hynb.errors import HynbError
from hynb.plan import ops, zero
from hynb.preflight.reach import rsync_command
from hynb.preflight.report import Cell, ranks_text
from hynb.preflight.targets import Known, Reply, interfaces_to_others
from hynb.supervision import CODE, host_bytes, shortages

_CLOCK_SECONDS = 2.0
_GB = 1e9
_DISK_BYTES = 1 * _GB
_CACHE_BYTES = 0.2 * _GB
# A GPU of which a larger share is in use runs somebody else's job.
_USED_SHARE = 0.1
# A full checkpoint has the weights twice and 12 bytes per parameter of optimizer state, against 2 bytes per weight.
_CHECKPOINT_FACTOR = 8
_REMAKE_ENVIRONMENT = f"cd {shlex.quote(str(CODE))} && make clean .venv"


def compare(reply: Reply, known: Known) -> list[Cell]:
    """All checks of a host that answered."""
    found = [
        _clock(reply),
        _python(reply, known),
        _versions(reply, known),
        _gpus(reply, known),
        _compiler(reply, known),
        *_memory(reply, known),
        _output_disk(reply, known),
        _cache_disk(reply),
        _code(reply, known),
        _model(reply, known),
        _data(reply, known),
        _output_dir(reply, known),
        _master_port(reply, known),
        _network(reply, known),
        _logins(reply, known),
    ]
    return [cell for cell in found if cell is not None]


def _ok(reply: Reply, check: str, text: str) -> Cell:
    return Cell(host=reply.target.name, check=check, state="ok", text=text)


def _bad(reply: Reply, check: str, problem: str, fix: str = "", *, there: bool = False) -> Cell:
    """A failed check.

    Args:
        there: whether the fix is to be run on the host itself.
    """
    name = reply.target.name
    fix_host = name if there and not reply.target.local else ""
    return Cell(host=name, check=check, state="bad", text=problem, fix=fix, fix_host=fix_host)


def _clock(reply: Reply) -> Cell:
    # The host read its clock between the request and the answer, after the time that collecting its facts took.
    ahead = reply.facts["time"] - reply.answered_at
    behind = reply.requested_at + reply.facts["elapsed_seconds"] - reply.facts["time"]
    off_seconds = ahead if ahead > 0 else -behind if behind > 0 else 0.0
    if abs(off_seconds) <= _CLOCK_SECONDS:
        return _ok(reply, "clock", "agrees")
    problem = f"{off_seconds:+.1f} s off: heartbeats and logs of the hosts would not agree"
    return _bad(reply, "clock", problem, "chronyc makestep || ntpdate -u pool.ntp.org", there=True)


def _python(reply: Reply, known: Known) -> Cell:
    here, there = known.reference["python"], reply.facts["python"]
    if here == there:
        return _ok(reply, "python", there)
    return _bad(reply, "python", f"{there}, but {here} here", _REMAKE_ENVIRONMENT, there=True)


def _versions(reply: Reply, known: Known) -> Cell:
    ours, theirs = (facts["versions"] | facts["cuda"] for facts in (known.reference, reply.facts))
    different = {name: (theirs.get(name), here) for name, here in ours.items() if theirs.get(name) != here}
    if different:
        problem = "; ".join(f"{name} {there}, but {here} here" for name, (there, here) in different.items())
        from_pip = {name for name, here in known.reference["versions"].items() if here != "not installed"} - {"hynb"}
        packages = [f"{name}=={here}" for name, (_, here) in different.items() if name in from_pip]
        # Without a package of pip's it is the same torch built for another CUDA, or hynb itself.
        fix = shlex.join([sys.executable, "-m", "pip", "install", *packages]) if packages else _REMAKE_ENVIRONMENT
        return _bad(reply, "versions", problem, fix, there=True)
    our_drivers, their_drivers = _drivers(known.reference), _drivers(reply.facts)
    if our_drivers and their_drivers and our_drivers != their_drivers:
        problem = f"driver {', '.join(their_drivers)}, but {', '.join(our_drivers)} here"
        return _bad(reply, "versions", problem, "apt-get install --only-upgrade 'nvidia-driver-*'", there=True)
    return _ok(reply, "versions", f"torch {theirs['torch']}")


def _drivers(facts: HostFacts) -> list[str]:
    return sorted({gpu.driver for gpu in _visible_gpus(facts)})


def _visible_gpus(facts: HostFacts) -> tuple[Gpu, ...]:
    return parse_gpus(facts["gpus"], facts["cuda_visible_devices"])


def _gpus(reply: Reply, known: Known) -> Cell:
    if reply.facts["gpus"].startswith(UNREADABLE):
        reason = reply.facts["gpus"].removeprefix(UNREADABLE)
        return _bad(reply, "GPUs", f"{reason}: the host has to be started again", "nvidia-smi", there=True)
    gpus = _visible_gpus(reply.facts)
    host = reply.target.host
    needed = max(host.slot_ids) + 1 if host.slot_ids else host.slots
    if not gpus:
        with_gpus = [other.target.name for other in known.replies if _visible_gpus(other.facts)]
        if with_gpus:
            return _bad(reply, "GPUs", f"none, but {with_gpus[0]} has some", "nvidia-smi", there=True)
        cores = reply.facts["cpu_cores"]
        if needed > cores:
            problem = f"{needed} slots, but {cores} CPU cores: each rank needs one"
            return _bad(reply, "GPUs", problem, _change_slots(known.config, host.name, cores))
        return _ok(reply, "GPUs", f"none: {ranks_text(needed)} on {cores} CPU cores")
    if needed > len(gpus):
        problem = f"{needed} slots, but {len(gpus)} GPU{'s' if len(gpus) != 1 else ''}"
        return _bad(reply, "GPUs", problem, _change_slots(known.config, host.name, len(gpus)))
    selected = [gpus[number] for number in host.slot_ids or range(host.slots)]
    used = [gpu for gpu in selected if gpu.memory_bytes and 1 - gpu.free_bytes / gpu.memory_bytes > _USED_SHARE]
    if used:
        return _bad(reply, "GPUs", ", ".join(map(_usage, used)), "nvidia-smi", there=True)
    return _ok(reply, "GPUs", f"{len(gpus)} × {gpus[0].name}")


def _usage(gpu: Gpu) -> str:
    used_bytes = gpu.memory_bytes - gpu.free_bytes
    return f"GPU {gpu.index}: {used_bytes / _GB:.0f} of {gpu.memory_bytes / _GB:.0f} GB in use"


def _change_slots(config: Config, name: str, slots: int) -> str:
    """The command that changes a host's number of slots in the hostfile; empty without a hostfile."""
    if not config.hostfile:
        return ""
    # `name slots=8` on a line of its own, or name:8 in a list.
    pattern = rf"(^|[,[:space:]])(\[?{re.escape(name)}\]?)([[:space:]]+slots=|:)"
    return shlex.join(["sed", "-i", "-E", rf"s/{pattern}[0-9]+/\1\2\3{slots}/", config.hostfile])


def _compiler(reply: Reply, known: Known) -> Cell | None:
    on_cpu = not _visible_gpus(reply.facts)
    try:
        ds_config = zero.for_machine(zero.load(known.config.deepspeed), on_cpu=on_cpu)
    except HynbError:
        # A launch names it.
        return None
    problem, fix = ops.compile_problem(ds_config, reply.facts["build_tools"], on_cpu=on_cpu, host="this host")
    if problem:
        presets = ", ".join(ops.without_ops(ds_config))
        return _bad(reply, "compiler", f"{problem}. Presets that need none: {presets}", fix, there=True)
    return _ok(reply, "compiler", "present") if ops.compiled_ops(ds_config, on_cpu=on_cpu) else None


def _memory(reply: Reply, known: Known) -> list[Cell]:
    """Memory, /dev/shm and locked memory, compared with what the run's plan takes."""
    facts, on_gpus = reply.facts["memory"], bool(_visible_gpus(reply.facts))
    hosts = [target.host for target in known.targets]
    planned = host_bytes(known.config, hosts, slots=reply.target.host.slots, on_gpus=on_gpus)
    lacking = shortages(facts, slots=reply.target.host.slots, on_gpus=on_gpus, planned_bytes=planned)
    free_bytes, total_bytes = facts["free_bytes"], facts["total_bytes"]
    if limit := facts["limit"]:
        free_bytes, total_bytes = min(free_bytes, limit["free_bytes"]), limit["limit_bytes"]
    text = f"{free_bytes / _GB:.0f} of {total_bytes / _GB:.0f} GB free"
    if planned:
        text += f", {planned / _GB:.0f} GB needed"
    texts = {"memory": text, "shared memory": f"{facts['shared_memory']['free_bytes'] / _GB:.1f} GB free"}
    if facts["infiniband"]:
        locked = facts["locked_bytes"]
        texts["locked memory"] = "no limit" if locked is None else f"{locked / _GB:.1f} GB"
    bad = {item.kind: _bad(reply, item.kind, item.text, item.fix, there=True) for item in lacking}
    return [bad.get(check) or _ok(reply, check, text) for check, text in texts.items()]


def _output_disk(reply: Reply, known: Known) -> Cell:
    config, disk = known.config, reply.facts["output_disk"]
    needed_bytes = _DISK_BYTES
    if config.model_name_or_path and not config.use_lora:
        weights_bytes = sum(path.stat().st_size for path in Path(config.model_name_or_path).glob("*.safetensors"))
        needed_bytes = max(needed_bytes, _CHECKPOINT_FACTOR * weights_bytes / len(known.targets))
    list_folders = _list_folders(disk["folder"])
    if not disk["writable"]:
        return _bad(reply, "disk", f"{disk['folder']} can't be written", list_folders, there=True)
    free = disk["free_bytes"] / _GB
    if disk["free_bytes"] < needed_bytes:
        problem = f"{free:.2g} GB free at output_dir, a checkpoint takes {needed_bytes / _GB:.2g} GB"
        return _bad(reply, "disk", problem, list_folders, there=True)
    return _ok(reply, "disk", f"{free:.0f} GB free")


def _cache_disk(reply: Reply) -> Cell:
    disk = reply.facts["cache_disk"]
    free = disk["free_bytes"] / _GB
    if disk["free_bytes"] < _CACHE_BYTES:
        return _bad(reply, "cache", f"{free:.2g} GB free for the cache", _list_folders(disk["folder"]), there=True)
    return _ok(reply, "cache", f"{free:.0f} GB free")


def _list_folders(folder: str) -> str:
    """The command that lists the largest folders below one."""
    return f"du -xh --max-depth=2 {shlex.quote(folder)} | sort -h | tail"


def _code(reply: Reply, known: Known) -> Cell:
    code = str(CODE / "hynb")
    if problem := _difference(reply.facts["code"], known.reference["code"], code):
        options = ["--delete", "--exclude=__pycache__"]
        return _bad(reply, "code", problem, rsync_command(reply.target, known.ssh, [f"{code}/"], f"{code}/", options))
    return _ok(reply, "code", "the same")


def _model(reply: Reply, known: Known) -> Cell | None:
    if not known.config.model_name_or_path:
        return None
    model = str(Path(known.config.model_name_or_path).expanduser().absolute())
    if known.reference["model"] is None:
        also = "" if reply.target.local else " on this machine either"
        return _bad(reply, "model", f"no {model} with a config.json{also}")
    if problem := _difference(reply.facts["model"], known.reference["model"], model):
        return _bad(reply, "model", problem, rsync_command(reply.target, known.ssh, [f"{model}/"], f"{model}/"))
    return _ok(reply, "model", "the same")


def _data(reply: Reply, known: Known) -> Cell | None:
    if not known.data:
        return None
    ours, theirs = known.reference["data"], reply.facts["data"]
    problems = {path: _difference(theirs[path], ours[path], path) for path in known.data}
    problems = {path: problem for path, problem in problems.items() if problem}
    if problems:
        fix = " && ".join(rsync_command(reply.target, known.ssh, [path], path) for path in problems)
        return _bad(reply, "data", ", ".join(problems.values()), fix)
    return _ok(reply, "data", "the same")


def _difference(theirs: str | None, ours: str | None, path: str) -> str:
    """How a host's file or folder differs from this machine's, by their hashes; empty when it does not."""
    if theirs is None:
        return f"missing: {path}" if ours is not None else ""
    if theirs.startswith(UNREADABLE):
        return f"{path} {theirs}"
    return "" if theirs == ours else f"differs from here: {path}"


def _output_dir(reply: Reply, known: Known) -> Cell | None:
    if len(known.targets) == 1:
        return None
    if reply.target.local:
        return _ok(reply, "output_dir", "this host's")
    shared = reply.facts["sees_token"]
    return _ok(reply, "output_dir", "shared with this host" if shared else "a folder of its own")


def _master_port(reply: Reply, known: Known) -> Cell | None:
    if known.port_taken_by:
        if not reply.target.local:
            return None
        free = known.port + 1 if known.port < 65535 else 29500
        problem = f"{known.port} is taken: {known.port_taken_by}"
        return _bad(reply, "master port", problem, f"--set master_port={free}")
    failed = reply.facts["connections"].get("master")
    if failed is None:
        return _ok(reply, "master port", "free") if reply.target.local else None
    if failed:
        program = "ip6tables" if ":" in reply.target.address else "iptables"
        allow = f"{program} -I INPUT -s {shlex.quote(reply.target.address)} -j ACCEPT"
        return _bad(reply, "master port", f"{known.port} of this machine can't be reached: {failed}", allow)
    return _ok(reply, "master port", "reached")


def _network(reply: Reply, known: Known) -> Cell | None:
    others = known.others(reply.target)
    if not others:
        return None
    routes, wanted = reply.facts["routes"], known.config.network_interface
    if blocked := [other.name for other in others if not routes.get(other.address)]:
        return _bad(reply, "network", f"no route to {', '.join(blocked)}", "ip route", there=True)
    right = interfaces_to_others(reply, known)
    if wanted and wanted not in right:
        state = "reaches none of them" if wanted in reply.facts["interfaces"] else "doesn't exist"
        problem = f"{wanted} {state}: {', '.join(right) or 'another one'} leads to the other hosts"
        return _bad(reply, "network", problem, f"--set network_interface={right[0] if right else 'auto'}")
    address = min(filter(None, (routes[other.address] for other in others)))
    return _ok(reply, "network", f"{right[0] if right else '?'} {address}")


def _logins(reply: Reply, known: Known) -> Cell | None:
    logins = reply.facts["logins"]
    if not logins:
        return None
    if failed := [f"can't log in on {name}: {reason}" for name, reason in logins.items() if reason]:
        return _bad(reply, "hosts' logins", "; ".join(failed), f"hynb hosts exchange{known.ssh.folder}")
    return _ok(reply, "hosts' logins", "all")
