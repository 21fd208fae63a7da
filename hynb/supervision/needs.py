"""Compares what a run takes of a host's memory with what the host has."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from hynb.cluster import DiskFacts, Host, MemoryFacts, Ssh, gpu_count, host_facts
from hynb.config import Config
from hynb.errors import HynbError
from hynb.files import read_json
from hynb.plan import memory, zero
from hynb.runs import find_base, workload

_GB = 1e9
# A rank that loads its libraries and a tiny model.
_LEAST_BYTES = 2 * _GB
# NCCL and a DataLoader's workers exchange data through shared memory: for a host, and for each of its ranks.
_SHARED_BYTES = {"cpu": 16e6, "gpu": 512e6}
_SHARED_BYTES_PER_GPU = 64e6
# NCCL registers its buffers with an InfiniBand adapter, which locks them: for each rank.
_LOCKED_BYTES = 1 * _GB
_ASK_SECONDS = 20.0


@dataclass(kw_only=True, frozen=True)
class Shortage:
    """What a host has too little of.

    Args:
        kind: memory, shared memory or locked memory.
        text: the figures, and where they come from.
        fix: a command on that host.
        hard: it will still be too little when nothing else runs there.
    """

    kind: str
    text: str
    fix: str
    hard: bool


def host_bytes(config: Config, hosts: Sequence[Host], *, slots: int, on_gpus: bool) -> int | None:
    """The host memory that a run takes of one of its hosts, by its plan; None where it has none.

    A plan is for one of the presets, and for a model whose sizes are in a file.

    Args:
        slots: ranks on the host; on GPUs the plan is for the host with the most.
    """
    if config.deepspeed not in zero.PRESETS:
        return None
    try:
        base = find_base(config)
        model_config = None if base is None else read_json(base / "config.json")
        if model_config is None:
            return None
        work = workload(config, [host.slots for host in hosts])
        plan = memory.estimate(model_config, work, preset=config.deepspeed)
        return plan.host_bytes if on_gpus else memory.cpu_bytes(plan, slots)
    except HynbError:
        # Another check names a wrong model folder.
        return None


def shortages(facts: MemoryFacts, *, slots: int, on_gpus: bool, planned_bytes: int | None) -> list[Shortage]:
    """What a host has too little of for its ranks.

    Args:
        slots: its ranks.
        planned_bytes: host memory that they take by the run's plan; None where it is not known.
    """
    found = [
        _lacking_memory(facts, planned_bytes, on_gpus=on_gpus),
        _lacking_shared_memory(facts["shared_memory"], slots, on_gpus=on_gpus),
        _lacking_locked_memory(facts, slots) if on_gpus else None,
    ]
    return [item for item in found if item is not None]


def _lacking_memory(facts: MemoryFacts, planned_bytes: int | None, *, on_gpus: bool) -> Shortage | None:
    needed = _LEAST_BYTES if planned_bytes is None else planned_bytes
    why = f"this run takes {needed / _GB:.1f} GB of this host by its plan" if planned_bytes else "a rank takes 2 GB"
    less = "end other programs"
    if planned_bytes:
        less = "choose a preset that keeps less in host memory" if on_gpus else "train an adapter (use_lora)"
        less += ", or more hosts"
    limit = facts["limit"]
    # A limit that is too small is said first: no end of other programs helps there.
    if facts["free_bytes"] < needed and not (limit is not None and limit["limit_bytes"] < needed):
        text = f"{facts['free_bytes'] / _GB:.1f} of {facts['total_bytes'] / _GB:.1f} GB are free, and {why}: {less}"
        hard = facts["total_bytes"] < needed
        return Shortage(kind="memory", text=text, fix="ps aux --sort=-rss | head", hard=hard)
    if limit is not None and limit["free_bytes"] < needed:
        text = (
            f"{limit['free_bytes'] / _GB:.1f} of the {limit['limit_bytes'] / _GB:.1f} GB that the container's limit "
            f"({limit['file']}) allows are free, and {why}: start the container with a higher limit "
            f"(docker run --memory={_gigabytes(needed)}g), or {less}"
        )
        hard = limit["limit_bytes"] < needed
        return Shortage(kind="memory", text=text, fix=f"cat {shlex.quote(limit['file'])}", hard=hard)
    return None


def _lacking_shared_memory(facts: DiskFacts, slots: int, *, on_gpus: bool) -> Shortage | None:
    needed = _SHARED_BYTES["gpu" if on_gpus else "cpu"]
    if on_gpus:
        needed = max(needed, _SHARED_BYTES_PER_GPU * slots)
    if facts["free_bytes"] >= needed:
        return None
    size = max(8, _gigabytes(needed))
    text = (
        f"/dev/shm: {facts['free_bytes'] / 1e6:.0f} MB free, {needed / 1e6:.0f} MB needed: make it larger; "
        f"for a container docker run --shm-size={size}g"
    )
    fix, hard = f"mount -o remount,size={size}G /dev/shm", facts["total_bytes"] < needed
    return Shortage(kind="shared memory", text=text, fix=fix, hard=hard)


def _lacking_locked_memory(facts: MemoryFacts, slots: int) -> Shortage | None:
    locked, adapters = facts["locked_bytes"], facts["infiniband"]
    # The limit holds for each process.
    if not adapters or locked is None or locked >= _LOCKED_BYTES:
        return None
    text = (
        f"a process may lock {locked / 1e6:.0f} MB (ulimit -l), and NCCL locks about {_LOCKED_BYTES / _GB:.0f} GB "
        f"in each of {slots} ranks for InfiniBand ({', '.join(adapters)}): raise it and log in again; for a "
        "container docker run --ulimit memlock=-1"
    )
    fix = "printf '* soft memlock unlimited\\n* hard memlock unlimited\\n' > /etc/security/limits.d/memlock.conf"
    return Shortage(kind="locked memory", text=text, fix=fix, hard=True)


def memory_problems(config: Config, hosts: Sequence[Host], here: int | None, ssh: Ssh | None) -> list[str]:
    """What the hosts of a run lack of memory even when nothing else runs there; all are asked at once.

    Nothing where this machine has no GPU and is none of the hosts, which may have some.

    Args:
        here: this machine's index among the hosts.
        ssh: how the others are asked; they are left out without it.
    """
    on_gpus = gpu_count() > 0
    if not on_gpus and here is None:
        return []

    def ask(index: int) -> list[str]:
        host, facts = hosts[index], None
        if index == here:
            facts = host_facts.memory()
        elif ssh is not None:
            script = host_facts.memory_script()
            answer = ssh.run(host.name, [sys.executable, "-"], deadline_seconds=_ASK_SECONDS, input=script)
            facts = host_facts.parse_memory(answer.out)
        if facts is None:
            return []
        planned = host_bytes(config, hosts, slots=host.slots, on_gpus=on_gpus)
        lacking = shortages(facts, slots=host.slots, on_gpus=on_gpus, planned_bytes=planned)
        return [f"{host.name}: {item.kind}: {item.text} (`{item.fix}`)" for item in lacking if item.hard]

    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        return [problem for problems in pool.map(ask, range(len(hosts))) for problem in problems]


def _gigabytes(size_bytes: float) -> int:
    return int(size_bytes / (1 << 30)) + 1
