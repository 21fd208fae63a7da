"""Tables of what this machine has, and a hostfile that names it."""

from __future__ import annotations

from pathlib import Path

from hynb.cluster import this_machine
from hynb.widgets.table import Table, size_text


def machine_table(folder: str | Path = ".") -> Table:
    """GPUs or their absence, cores, memory and the disk of a folder."""
    machine = this_machine(folder)
    rows = [("host", machine.host)]
    for gpu in machine.gpus:
        memory = f"{size_text(gpu.memory_bytes)}, {size_text(gpu.free_bytes)} free" if gpu.memory_bytes else "shared"
        rows.append((f"GPU {gpu.index}", f"{gpu.name}: {memory}, driver {gpu.driver}"))
    if not machine.gpus:
        rows.append(("GPUs", "none: training runs on the CPU, for small models only"))
    rows += [
        ("CPU cores", str(machine.cpu_cores)),
        ("memory", f"{size_text(machine.memory_bytes)}, {size_text(machine.memory_free_bytes)} free"),
        ("disk", f"{size_text(machine.disk_free_bytes)} free for {Path(folder).expanduser().absolute()}"),
    ]
    return Table(columns=("what", "value"), rows=rows, title="This machine")


def versions_table() -> Table:
    """Python and the packages that training depends on."""
    machine = this_machine()
    rows = [("python", machine.python), *machine.versions.items()]
    return Table(columns=("package", "version"), rows=rows, title="Versions")
