"""Tables of what this machine has, and a hostfile with this machine alone."""

from __future__ import annotations

from pathlib import Path

from hynb.cluster import hostfile, this_machine
from hynb.errors import ClusterError, ConfigError
from hynb.files import size_text
from hynb.widgets.table import Table


def machine_table(folder: str | Path = ".") -> Table:
    """GPUs, CPU cores, memory, and the free space on the disk of a folder."""
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
    """The versions of Python and of the packages that training depends on."""
    machine = this_machine()
    rows = [("python", machine.python), *machine.versions.items()]
    return Table(columns=("package", "version"), rows=rows, title="Versions")


def write_local_hostfile(path: str | Path, *, slots: int | str = "auto", overwrite: bool = False) -> Table:
    """Writes a hostfile with this machine alone.

    Args:
        slots: ranks on this machine; "auto" for one per GPU, or one on a CPU.
        overwrite: replace a file with other content.

    Returns:
        a table with the path and the content of the file.

    Raises:
        ConfigError: slots is not a number of ranks.
        ClusterError: the file has other content, or cannot be written.
    """
    if slots == "auto":
        slots = this_machine().slots
    if not isinstance(slots, int) or slots < 1:
        raise ConfigError(f'slots = {slots!r}: must be a whole number ≥ 1, or "auto"')
    path = Path(path).expanduser().absolute()
    hosts = hostfile.local(slots)
    text = hostfile.to_text(hosts)
    if path.exists() and path.read_text(encoding="utf-8") != text and not overwrite:
        raise ClusterError(
            f"hostfile = {path}: exists already and does not contain {text.strip()!r}; choose another path, or "
            "replace the file with overwrite_hostfile"
        )
    try:
        hostfile.write(path, hosts)
    except OSError as error:
        raise ClusterError(f"hostfile = {path}: cannot be written: {error.strerror}") from None
    return Table(columns=("hostfile", "content"), rows=[(str(path), text.strip())])
