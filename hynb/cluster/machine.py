"""What this machine has: GPUs or CPU cores, memory, disk, versions."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from hynb.cluster import host_facts

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
    memory = psutil.virtual_memory()
    return Machine(
        host=socket.gethostname(),
        gpus=_gpus(),
        cpu_cores=len(os.sched_getaffinity(0)),
        memory_bytes=memory.total,
        memory_free_bytes=memory.available,
        disk_free_bytes=shutil.disk_usage(host_facts.existing_folder(folder)).free,
        python=platform.python_version(),
        versions={name: host_facts.version(name) for name in PACKAGES},
    )


def _gpus() -> tuple[Gpu, ...]:
    if not gpu_count():
        return ()
    return parse_gpus(host_facts.gpu_table(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_gpus(table: str, visible: str | None) -> tuple[Gpu, ...]:
    """The GPUs in nvidia-smi's table that CUDA_VISIBLE_DEVICES makes visible.

    Args:
        table: lines of index, uuid, name, total MiB, free MiB, driver.
        visible: value of CUDA_VISIBLE_DEVICES: indices or prefixes of uuids, separated by commas; None if not set.
    """
    names = None if visible is None else [item.strip() for item in visible.split(",") if item.strip()]
    found = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 6:
            continue
        index, uuid, name, total, free, driver = cells
        if names is not None and not any(item == index or uuid.startswith(item) for item in names):
            continue
        # A GPU that shares the host's memory reports "[N/A]".
        sizes = [int(value) << 20 if value.isdigit() else 0 for value in (total, free)]
        gpu = Gpu(index=int(index), name=name, memory_bytes=sizes[0], free_bytes=sizes[1], driver=driver)
        found.append(gpu)
    return tuple(found)


def gpu_count() -> int:
    """Number of NVIDIA GPUs that a job started here would see, found without a CUDA context in this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([item for item in visible.split(",") if item.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return len([line for line in done.stdout.splitlines() if line.startswith("GPU ")])
