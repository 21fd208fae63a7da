"""What one host has, as JSON: `sent` to a host and run there, so that it imports the standard library alone."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import struct
import subprocess
import time
from pathlib import Path

# Bytes of a large data file that are compared whole; beyond, blocks spread over the file stand for it.
WHOLE_BYTES = 2 << 30
_BLOCKS, _BLOCK_BYTES = 256, 1 << 20
_CONNECT_SECONDS = 5.0
_HEADER_BYTES = 64 << 20
# A driver that has lost a GPU may let nvidia-smi wait for minutes.
_DRIVER_SECONDS = 20.0
_SIOCGIFADDR, _IFF_UP = 0x8915, 1
_MARK = "hynb-facts "
# In place of a hash: why there is none.
UNREADABLE = "can't be read: "


def sent(request: dict) -> str:
    """This module with a request, for the standard input of a Python: a command line has no room for many files."""
    return Path(__file__).read_text(encoding="utf-8") + f"\n\nmain(json.loads({json.dumps(request)!r}))\n"


def told(out: str) -> dict | None:
    """The facts in what a host has printed, login scripts and all; None where there are none."""
    line = next((line for line in out.splitlines() if line.startswith(_MARK)), None)
    return None if line is None else json.loads(line.removeprefix(_MARK))


def main(request: dict) -> None:
    """Prints the facts that were asked for, in one line behind a mark."""
    began = time.monotonic()
    facts = {
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in request["packages"]},
        "cuda": cuda_of_torch(),
        "gpus": gpu_table(),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "cpu_cores": len(os.sched_getaffinity(0)),
        **memory(),
        "shm": disk("/dev/shm"),
        "output_disk": disk(request["output_dir"]),
        "cache_disk": disk(os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")),
        "code": _hash(code_hash, request["code"]),
        "model": _hash(folder_hash, request["model"]) if request["model"] else None,
        "data": {path: _hash(file_identity, path) for path in request["data"]},
        "sees_token": request["token"] is not None and Path(request["token"]).exists(),
        "interfaces": interfaces(),
        "route": {address: source_address(address) for address in request["addresses"]},
        "connects": {},
        "logins": {},
    }
    for name, (address, port) in request["connect"].items():
        facts["connects"][name] = try_connection(address, port)
    for name, command in request["login"].items():
        facts["logins"][name] = try_login(command)
    # The clock is read last, right before it is sent.
    facts["time"] = time.time()
    facts["taken_seconds"] = time.monotonic() - began
    print(_MARK + json.dumps(facts), flush=True)


def _hash(of, path: str) -> str | None:
    try:
        return of(Path(path))
    except OSError as error:
        return f"{UNREADABLE}{error.strerror}"


def version(package: str) -> str:
    """A package's version; "not installed" where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cuda_of_torch() -> dict[str, str]:
    """CUDA and NCCL that torch was built for, read from its files: importing it would take seconds."""
    found = {"cuda": "", "nccl": ""}
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        try:
            text = (Path(spec.submodule_search_locations[0]) / "version.py").read_text()
            match = re.search(r"^cuda\b[^=\n]*= '([^']+)'", text, re.MULTILINE)
            found["cuda"] = match[1] if match else "none"
        except OSError:
            pass
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"] or ""
        if name.startswith("nvidia-nccl-"):
            found["nccl"] = distribution.version
    return found


def gpu_table() -> str:
    """nvidia-smi's table: index, uuid, name, MiB in all, MiB free, driver; empty without GPUs."""
    if shutil.which("nvidia-smi") is None:
        return ""
    fields = "index,uuid,name,memory.total,memory.free,driver_version"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_DRIVER_SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def memory() -> dict[str, int]:
    """Bytes of host memory in all, and free for new work."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    sizes = {name: int(lines[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable")}
    return {"memory_bytes": sizes["MemTotal"], "memory_free_bytes": sizes["MemAvailable"]}


def disk(path: str) -> dict:
    """Bytes of the disk that a path lies on or would lie on, and whether it can be written."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    return {"total": usage.total, "free": usage.free, "writable": os.access(place, os.W_OK), "place": str(place)}


def code_hash(folder: Path) -> str | None:
    """A hash of the package's Python files, by name and content; None where there is no such folder."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def folder_hash(folder: Path) -> str | None:
    """A hash of a model folder: names, sizes, small files whole, headers of safetensors; None without config.json.

    777 GB of values are not read.
    """
    if not (folder / "config.json").is_file():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        size_bytes = path.stat().st_size
        digest.update(f"{path.name}:{size_bytes}\n".encode())
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                digest.update(file.read(min(int.from_bytes(file.read(8), "little"), _HEADER_BYTES)))
            elif size_bytes < _HEADER_BYTES:
                digest.update(file.read())
    return digest.hexdigest()


def file_identity(path: Path) -> str | None:
    """A hash of a file's size and content, of blocks spread over it where it is huge; None where there is none."""
    if not path.is_file():
        return None
    size_bytes = path.stat().st_size
    digest = hashlib.sha256(f"{size_bytes}\n".encode())
    with path.open("rb") as file:
        if size_bytes <= WHOLE_BYTES:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        else:
            for number in range(_BLOCKS):
                file.seek((size_bytes - _BLOCK_BYTES) * number // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def interfaces() -> dict[str, list[str]]:
    """Addresses by network interface, those that are up."""
    try:
        asked = subprocess.run(["ip", "-j", "addr", "show", "up"], capture_output=True, text=True, check=False)
        listed = json.loads(asked.stdout or "[]")
    except (OSError, ValueError):
        # Containers often lack the program.
        return interfaces_of_kernel()
    # Interfaces that are down are listed as empty objects.
    return {item["ifname"]: [entry["local"] for entry in item.get("addr_info", [])] for item in listed if item}


def interfaces_of_kernel() -> dict[str, list[str]]:
    """The same without the program `ip`: of IPv4 the first address of each interface."""
    found: dict[str, list[str]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                if not int(Path(f"/sys/class/net/{name}/flags").read_text(), 16) & _IFF_UP:
                    continue
                found[name] = []
                told = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                found[name].append(socket.inet_ntoa(told[20:24]))
            except OSError:
                continue
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.is_file() else ():
        address, *_, name = line.split()
        if name in found:
            found[name].append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address)))
    return found


def source_address(address: str) -> str | None:
    """The address of this host's from which another is reached; None where no way leads there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            # Sends nothing: the system only says which way it would take.
            probe.connect((address, 9))
            return probe.getsockname()[0]
        except OSError:
            return None


def try_connection(address: str, port: int) -> str:
    """Connects to a port; empty when that works, else why not."""
    try:
        with socket.create_connection((address, port), timeout=_CONNECT_SECONDS):
            return ""
    except OSError as error:
        return str(error.strerror or error)


def try_login(command: list[str]) -> str:
    """Runs an ssh command that does nothing; empty when that works, else ssh's last word."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=15)
    except (subprocess.TimeoutExpired, OSError) as error:
        return str(error)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["refused"])[-1]
