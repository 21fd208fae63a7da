"""What this machine has: GPUs or CPU cores, memory, disk, versions."""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from hynb.cluster import host_facts
from hynb.cluster.hostfile import Host
from hynb.errors import ClusterError

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
_MIG = "MIG-"
PACKAGES = ("hynb", "torch", "transformers", "deepspeed", "peft", "safetensors")


@dataclass(kw_only=True, frozen=True)
class Gpu:
    """One GPU as its driver reports it."""

    index: int
    name: str
    memory_bytes: int
    free_bytes: int
    driver: str


@dataclass(kw_only=True, frozen=True)
class Machine:
    """What a run on this machine can use.

    Args:
        gpus: those that a job started here would see; empty on a machine without GPUs.
        cpu_cores: cores on which this process may run.
        memory_bytes: in a container, up to its limit.
        disk_free_bytes: free space where the run folder would be.
        versions: by package; "not installed" for a missing one.
    """

    host: str
    gpus: tuple[Gpu, ...]
    cpu_cores: int
    memory_bytes: int
    memory_free_bytes: int
    disk_free_bytes: int
    python: str
    versions: dict[str, str]

    @property
    def slots(self) -> int:
        """Number of ranks that a run uses here by default: one per GPU, or one on the CPU."""
        return len(self.gpus) or 1


def this_machine(folder: str | Path = ".") -> Machine:
    """Describes this machine, without importing torch.

    Args:
        folder: the folder whose disk is measured; it need not exist yet.
    """
    memory = host_facts.memory()
    limit = memory["limit"]
    return Machine(
        host=socket.gethostname(),
        gpus=_gpus(),
        cpu_cores=len(os.sched_getaffinity(0)),
        memory_bytes=limit["limit_bytes"] if limit else memory["total_bytes"],
        memory_free_bytes=min(memory["free_bytes"], limit["free_bytes"] if limit else memory["free_bytes"]),
        disk_free_bytes=shutil.disk_usage(host_facts.existing_folder(folder)).free,
        python=platform.python_version(),
        versions={name: host_facts.version(name) for name in PACKAGES},
    )


def _gpus() -> tuple[Gpu, ...]:
    visible = os.environ.get(VISIBLE_VARIABLE)
    if visible is not None and not visible_names(visible):
        return ()
    return parse_gpus(host_facts.gpu_table(), visible)


def visible_names(visible: str) -> list[str]:
    """The devices that a value of CUDA_VISIBLE_DEVICES names, in order; as for CUDA, an invalid one ends the list."""
    names = [name.strip() for name in visible.split(",")]
    return list(itertools.takewhile(lambda name: name not in ("", "-1"), names))


def chosen_devices(host: Host, visible: str | None) -> tuple[str, ...] | None:
    """What CUDA_VISIBLE_DEVICES on a host names for the slots of its ranks: indices, UUIDs or MIG names.

    Args:
        visible: its value there; None where it is not set.

    Returns:
        one name per rank; none of them where the variable hides all GPUs; None where it is not set.

    Raises:
        ClusterError: there are more slots than devices.
    """
    if visible is None:
        return None
    names, slots = visible_names(visible), host.slot_ids or tuple(range(host.slots))
    if names and max(slots) >= len(names):
        raise ClusterError(
            f"{host.name}: slot {max(slots)} is to be used, but {VISIBLE_VARIABLE}={visible} there names "
            f"{len(names)} devices. Write slots={len(names)} in the hostfile, or change the variable"
        )
    return tuple(names[slot] for slot in slots) if names else ()


def parse_gpus(table: str, visible: str | None) -> tuple[Gpu, ...]:
    """The GPUs in the driver's table that CUDA_VISIBLE_DEVICES makes visible, in its order.

    Args:
        table: lines of index, uuid, name, total MiB, free MiB, driver; the MIG devices of a GPU follow it.
        visible: value of CUDA_VISIBLE_DEVICES: indices or prefixes of uuids, separated by commas; None if not set.
    """
    # By uuid; of a GPU that is divided into MIG devices CUDA uses the first one.
    rows: dict[str, Gpu] = {}
    whole: dict[str, str] = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 6:
            continue
        index, uuid, name, total, free, driver = cells
        # A GPU that shares the host's memory reports "[N/A]".
        sizes = [int(value) << 20 if value.isdigit() else 0 for value in (total, free)]
        rows[uuid] = Gpu(index=int(index), name=name, memory_bytes=sizes[0], free_bytes=sizes[1], driver=driver)
        if not uuid.startswith(_MIG) or not whole[index].startswith(_MIG):
            whole[index] = uuid
    if visible is None:
        return tuple(rows[uuid] for uuid in whole.values())
    found = []
    for name in visible_names(visible):
        uuid = whole.get(name) or next((uuid for uuid in rows if uuid.startswith(name)), None)
        if uuid is None:
            break
        found.append(rows[uuid])
    return tuple(found)


def gpu_count() -> int:
    """Number of NVIDIA GPUs that a job started here would see, found without a CUDA context in this process.

    Raises:
        ClusterError: the driver does not answer, or CUDA_VISIBLE_DEVICES names a device that it does not have.
    """
    visible = os.environ.get(VISIBLE_VARIABLE)
    names = None if visible is None else visible_names(visible)
    if names == []:
        return 0
    table = host_facts.gpu_table()
    if names and not table:
        # DeepSpeed's launcher names one device per rank in its ranks, also where it starts them on the CPU.
        return 0 if "LOCAL_RANK" in os.environ else len(names)
    if table.startswith(host_facts.UNREADABLE):
        reason = table.removeprefix(host_facts.UNREADABLE)
        raise ClusterError(
            f"GPUs of {socket.gethostname()}: {reason}. Try `nvidia-smi`; a machine whose driver hangs has to be "
            f"started again. To train on the CPU meanwhile: `export {VISIBLE_VARIABLE}=`"
        )
    if unknown := [name for name in names or () if not _is_known(name, table)]:
        here = ", ".join(f"{gpu.index} {gpu.name}" for gpu in parse_gpus(table, None))
        raise ClusterError(
            f"{VISIBLE_VARIABLE}={visible}: {socket.gethostname()} has no device {', '.join(unknown)}, and CUDA "
            f"would ignore what follows it; there are {here}. Correct the variable: `export {VISIBLE_VARIABLE}=…`"
        )
    return len(parse_gpus(table, None) if names is None else names)


def _is_known(name: str, table: str) -> bool:
    """Whether the driver's table has a device; only NVML lists MIG devices in it."""
    return bool(parse_gpus(table, name)) or (name.startswith(_MIG) and _MIG not in table)
