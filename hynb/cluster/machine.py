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


def free_port() -> int:
    """A TCP port that is free now on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
        gpus: those that a job started here would see; empty on a machine without.
        cpu_cores: cores that this process may run on.
        disk_free_bytes: free where the run folder would be.
        versions: by package; "not installed" where one is missing.
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
        """Ranks that a run uses here by itself: one a GPU, or one on a CPU."""
        return len(self.gpus) or 1


def this_machine(folder: str | Path = ".") -> Machine:
    """Looks at this machine, without importing torch.

    Args:
        folder: whose disk is looked at; the nearest folder above it that exists.
    """
    place = Path(folder).expanduser().absolute()
    while not place.exists():
        place = place.parent
    memory = psutil.virtual_memory()
    return Machine(
        host=socket.gethostname(),
        gpus=_gpus(),
        cpu_cores=len(os.sched_getaffinity(0)),
        memory_bytes=memory.total,
        memory_free_bytes=memory.available,
        disk_free_bytes=shutil.disk_usage(place).free,
        python=platform.python_version(),
        versions={name: host_facts.version(name) for name in PACKAGES},
    )


def _gpus() -> tuple[Gpu, ...]:
    if not gpu_count():
        return ()
    return parse_gpus(host_facts.gpu_table(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_gpus(text: str, visible: str | None) -> tuple[Gpu, ...]:
    """GPUs from nvidia-smi's table, those alone that CUDA_VISIBLE_DEVICES names, where it is set.

    Args:
        text: lines of index, uuid, name, total MiB, free MiB, driver.
        visible: indices or the beginnings of uuids, separated by commas; None for all.
    """
    names = None if visible is None else [item.strip() for item in visible.split(",") if item.strip()]
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 6:
            continue
        index, uuid, name, total, free, driver = cells
        if names is not None and not any(item == index or uuid.startswith(item) for item in names):
            continue
        # A GPU that shares its host's memory reports none of its own.
        sizes = [int(value) << 20 if value.isdigit() else 0 for value in (total, free)]
        gpu = Gpu(index=int(index), name=name, memory_bytes=sizes[0], free_bytes=sizes[1], driver=driver)
        found.append(gpu)
    return tuple(found)


def gpu_count() -> int:
    """NVIDIA GPUs that a job started here would see, without a CUDA context in this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([item for item in visible.split(",") if item.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return len([line for line in answer.stdout.splitlines() if line.startswith("GPU ")])
