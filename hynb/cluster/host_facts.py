"""What one host has, as JSON. The source text is sent to hosts and run there: it needs the standard library alone."""

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
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

# A data file up to this size is hashed whole, of a larger one blocks that are spread over it.
WHOLE_BYTES = 2 << 30
_BLOCKS, _BLOCK_BYTES = 256, 1 << 20
_CONNECT_SECONDS = 5.0
_LOGIN_SECONDS = 15.0
_HEADER_BYTES = 64 << 20
# A driver that has lost a GPU can keep nvidia-smi waiting for minutes.
_DRIVER_SECONDS = 20.0
_SIOCGIFADDR, _IFF_UP = 0x8915, 1
_MARK = "hynb-facts "
# Begins a text that stands in place of a hash and gives the reason why there is none.
UNREADABLE = "can't be read: "


class FactsRequest(TypedDict):
    """What a host is to report.

    packages: names whose versions are compared.
    code: the folder of this package.
    output_dir: the run folder, whose disk is measured.
    model: the model folder; None for no model.
    data: files that every rank reads.
    token: a file in the launching host's run folder or above it: whoever sees it shares that folder.
    addresses: of the other hosts, to find the routes there.
    connect: address and port to connect to, by any name.
    login: an ssh command that logs in and does nothing, by host.
    """

    packages: list[str]
    code: str
    output_dir: str
    model: str | None
    data: list[str]
    token: str
    addresses: list[str]
    connect: dict[str, tuple[str, int]]
    login: dict[str, list[str]]


class DiskFacts(TypedDict):
    """A disk in bytes, and the existing folder at which it was measured."""

    total_bytes: int
    free_bytes: int
    writable: bool
    folder: str


class HostFacts(TypedDict):
    """What a host reports.

    versions: by package; "not installed" for a missing one.
    cuda: versions of `cuda` and `nccl` that torch was built for; empty where unknown.
    gpus: nvidia-smi's table (see `gpu_table`); empty without GPUs.
    code, model, data: hashes; None for what does not exist, a text that begins with UNREADABLE on an error.
    sees_token: whether the launching host's token exists here.
    interfaces: addresses by network interface.
    routes: this host's address towards each requested one; None without a route.
    connections, logins: empty for each that succeeded, else the reason.
    time: this host's clock, read last, in seconds since the epoch.
    elapsed_seconds: time that collecting all this took.
    """

    hostname: str
    python: str
    versions: dict[str, str]
    cuda: dict[str, str]
    gpus: str
    cuda_visible_devices: str | None
    cpu_cores: int
    memory_bytes: int
    memory_free_bytes: int
    shared_memory: DiskFacts
    output_disk: DiskFacts
    cache_disk: DiskFacts
    code: str | None
    model: str | None
    data: dict[str, str | None]
    sees_token: bool
    interfaces: dict[str, list[str]]
    routes: dict[str, str | None]
    connections: dict[str, str]
    logins: dict[str, str]
    time: float
    elapsed_seconds: float


def script_for(request: FactsRequest) -> str:
    """This module followed by a call with the request, for the standard input of a host's Python.

    Standard input, because a command line is too short for a request that names many files.
    """
    return Path(__file__).read_text(encoding="utf-8") + f"\n\nmain(json.loads({json.dumps(request)!r}))\n"


def parse_output(output: str) -> HostFacts | None:
    """The facts in a host's output, which may begin with a login script's; None if there are none."""
    line = next((line for line in output.splitlines() if line.startswith(_MARK)), None)
    return None if line is None else json.loads(line.removeprefix(_MARK))


def main(request: FactsRequest) -> None:
    """Prints the requested facts as one line of JSON behind a mark."""
    began = time.monotonic()
    memory_bytes, memory_free_bytes = memory()
    facts: HostFacts = {
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in request["packages"]},
        "cuda": cuda_of_torch(),
        "gpus": gpu_table(),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory_bytes,
        "memory_free_bytes": memory_free_bytes,
        "shared_memory": disk("/dev/shm"),
        "output_disk": disk(request["output_dir"]),
        "cache_disk": disk(os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")),
        "code": _hash_or_reason(code_hash, request["code"]),
        "model": _hash_or_reason(folder_hash, request["model"]) if request["model"] else None,
        "data": {path: _hash_or_reason(file_hash, path) for path in request["data"]},
        "sees_token": Path(request["token"]).exists(),
        "interfaces": interfaces(),
        "routes": {address: source_address(address) for address in request["addresses"]},
        "connections": {name: try_connection(*endpoint) for name, endpoint in request["connect"].items()},
        "logins": {name: try_login(command) for name, command in request["login"].items()},
        # Read last, right before it is sent.
        "time": time.time(),
        "elapsed_seconds": time.monotonic() - began,
    }
    print(_MARK + json.dumps(facts), flush=True)


def _hash_or_reason(hash_of: Callable[[Path], str | None], path: str) -> str | None:
    try:
        return hash_of(Path(path))
    except OSError as error:
        return f"{UNREADABLE}{error.strerror}"


def version(package: str) -> str:
    """A package's version; "not installed" for a missing one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cuda_of_torch() -> dict[str, str]:
    """Versions of CUDA and NCCL that torch was built for, from its files: importing it would take seconds."""
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
    """nvidia-smi's table: index, uuid, name, total MiB, free MiB, driver; empty without GPUs."""
    if shutil.which("nvidia-smi") is None:
        return ""
    fields = "index,uuid,name,memory.total,memory.free,driver_version"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_DRIVER_SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def memory() -> tuple[int, int]:
    """Bytes of host memory: total, and available to a new process."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(lines[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    return total, available


def existing_folder(path: str | Path) -> Path:
    """A folder, or the nearest folder above it that exists."""
    folder = Path(path).expanduser().absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def disk(path: str) -> DiskFacts:
    """The disk on which a path lies, or would lie."""
    folder = existing_folder(path)
    usage = shutil.disk_usage(folder)
    return {
        "total_bytes": usage.total,
        "free_bytes": usage.free,
        "writable": os.access(folder, os.W_OK),
        "folder": str(folder),
    }


def code_hash(folder: Path) -> str | None:
    """A hash of a package's .py and .pyi files, by name and content; None if the folder does not exist."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    # lazy_loader reads the stub files when the package is imported.
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.pyi")]):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def folder_hash(folder: Path) -> str | None:
    """A hash of a model folder: names, sizes, content of small files, headers of safetensors files.

    None without config.json. Weights are not read: 777 GB would take an hour.
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


def file_hash(path: Path) -> str | None:
    """A hash of a file's size and content, above WHOLE_BYTES of evenly spaced blocks; None if it does not exist."""
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
    """Addresses by network interface, of those that are up."""
    try:
        done = subprocess.run(["ip", "-j", "addr", "show", "up"], capture_output=True, text=True, check=False)
        listed = json.loads(done.stdout or "[]")
    except (OSError, ValueError):
        # Containers often lack the program.
        return interfaces_of_kernel()
    # Interfaces that are down are listed as empty objects.
    return {item["ifname"]: [entry["local"] for entry in item.get("addr_info", [])] for item in listed if item}


def interfaces_of_kernel() -> dict[str, list[str]]:
    """Like `interfaces` without the program `ip`: of IPv4 only the first address of each interface."""
    found: dict[str, list[str]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                if not int(Path(f"/sys/class/net/{name}/flags").read_text(), 16) & _IFF_UP:
                    continue
                found[name] = []
                # struct ifreq: 16 bytes name, then a sockaddr_in, whose address begins at its byte 4.
                result = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                found[name].append(socket.inet_ntoa(result[20:24]))
            except OSError:
                continue
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.is_file() else ():
        address, *_, name = line.split()
        if name in found:
            found[name].append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address)))
    return found


def source_address(address: str) -> str | None:
    """This host's address on the route to another IP address; None without a route."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            # A datagram socket sends nothing here: the kernel only chooses the route.
            probe.connect((address, 9))
            return probe.getsockname()[0]
        except OSError:
            return None


def try_connection(address: str, port: int, timeout_seconds: float = _CONNECT_SECONDS) -> str:
    """Connects to a TCP port; empty on success, else the reason."""
    try:
        with socket.create_connection((address, port), timeout=timeout_seconds):
            return ""
    except OSError as error:
        return str(error.strerror or error)


def try_login(command: list[str]) -> str:
    """Runs an ssh command that does nothing; empty on success, else the last line of its errors."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_LOGIN_SECONDS, check=False
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        return str(error)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["refused"])[-1]
