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
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypedDict

# A data file up to this size is hashed whole, of a larger one blocks that are spread over it.
WHOLE_BYTES = 2 << 30
_BLOCKS, _BLOCK_BYTES = 256, 1 << 20
_CONNECT_SECONDS = 5.0
_LOGIN_SECONDS = 15.0
_HEADER_BYTES = 64 << 20
# A driver that has lost a GPU can keep whoever asks it waiting for ever.
DRIVER_SECONDS = 20.0
_SIOCGIFADDR, _IFF_UP = 0x8915, 1
_MARK = "hynb-facts "
_NO_PYNVML, _NO_DRIVER = 3, 4
# Prints the table by NVML (package nvidia-ml-py), for a process of its own; MIG devices follow their GPU.
_NVML_TABLE = f"""
import sys
try:
    import pynvml as nvml
except ImportError:
    sys.exit({_NO_PYNVML})
def text(value):
    return value.decode() if isinstance(value, bytes) else value
def row(index, handle, name, driver):
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        sizes = [memory.total >> 20, memory.free >> 20]
    except nvml.NVMLError:
        sizes = ["[N/A]", "[N/A]"]
    print(index, text(nvml.nvmlDeviceGetUUID(handle)), name, *sizes, driver, sep=", ", flush=True)
try:
    nvml.nvmlInit()
    driver = text(nvml.nvmlSystemGetDriverVersion())
    for index in range(nvml.nvmlDeviceGetCount()):
        gpu = nvml.nvmlDeviceGetHandleByIndex(index)
        name = text(nvml.nvmlDeviceGetName(gpu))
        row(index, gpu, name, driver)
        try:
            parts = nvml.nvmlDeviceGetMaxMigDeviceCount(gpu) if nvml.nvmlDeviceGetMigMode(gpu)[0] else 0
        except nvml.NVMLError:
            parts = 0
        for part in range(parts):
            try:
                device = nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, part)
            except nvml.NVMLError:
                continue
            row(index, device, name + " MIG", driver)
except nvml.NVMLError as error:
    print(error, file=sys.stderr)
    sys.exit({_NO_DRIVER})
"""
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


class MemoryLimit(TypedDict):
    """The tightest limit that a container sets on host memory: bytes, those still free, and the file that says so."""

    limit_bytes: int
    free_bytes: int
    file: str


class MemoryFacts(TypedDict):
    """What a host's processes can use of its memory.

    Args:
        total_bytes, free_bytes: of the machine.
        limit: of the container; None where there is none.
        shared_memory: /dev/shm.
        locked_bytes: how much of its memory a process may lock (RLIMIT_MEMLOCK); None for no limit.
        infiniband: names of the host's InfiniBand adapters; memory that they use is locked.
    """

    total_bytes: int
    free_bytes: int
    limit: MemoryLimit | None
    shared_memory: DiskFacts
    locked_bytes: int | None
    infiniband: list[str]


class HostFacts(TypedDict):
    """What a host reports.

    versions: by package; "not installed" for a missing one.
    cuda: versions of `cuda` and `nccl` that torch was built for; empty where unknown.
    gpus: the driver's table (see `gpu_table`); empty without GPUs.
    build_tools: see `build_tools`.
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
    build_tools: dict[str, bool]
    cpu_cores: int
    memory: MemoryFacts
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


def memory_script() -> str:
    """This module followed by a call that prints the facts on memory alone, for a host's Python."""
    return Path(__file__).read_text(encoding="utf-8") + "\n\nprint(_MARK + json.dumps(memory()))\n"


def parse_memory(output: str) -> MemoryFacts | None:
    """The facts in the output of `memory_script`; None if there are none."""
    line = next((line for line in output.splitlines() if line.startswith(_MARK)), None)
    return None if line is None else json.loads(line.removeprefix(_MARK))


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
    facts: HostFacts = {
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in request["packages"]},
        "cuda": cuda_of_torch(),
        "gpus": gpu_table(),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "build_tools": build_tools(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory": memory(),
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


def build_tools() -> dict[str, bool]:
    """What torch compiles C++ and CUDA code with, and whether it is there (torch/utils/cpp_extension.py)."""
    # CXX may hold several words, such as "ccache g++".
    words = [word for word in os.environ.get("CXX", "c++").split() if not word.startswith("-")] or ["c++"]
    compiler = all(shutil.which(word) for word in words)
    nvcc = shutil.which("nvcc")
    cuda = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or (nvcc and str(Path(nvcc).parents[1]))
    return {
        "compiler": compiler,
        # pip puts it beside the interpreter.
        "ninja": bool(shutil.which("ninja") or shutil.which(str(Path(sys.executable).with_name("ninja")))),
        "python": (Path(sysconfig.get_path("include")) / "Python.h").is_file(),
        "cuda": shutil.which(str(Path(cuda or "/usr/local/cuda") / "bin" / "nvcc")) is not None,
        "libaio": compiler and _compiles([*words, "-fsyntax-only", "-x", "c++", "-"], "#include <libaio.h>\n"),
    }


def _compiles(command: list[str], source: str) -> bool:
    try:
        return (
            subprocess.run(command, input=source, capture_output=True, text=True, timeout=20, check=False).returncode
            == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


def gpu_table() -> str:
    """The driver's table, one line per GPU or MIG device: index, uuid, name, total MiB, free MiB, driver version.

    By NVML where nvidia-ml-py is installed, else by nvidia-smi, which lists no MIG devices.

    Returns:
        empty without GPUs; a text that begins with UNREADABLE where the driver does not answer in time.
    """
    has_program = shutil.which("nvidia-smi") is not None
    if not has_program and not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg"))):
        return ""
    code, out = output_within([sys.executable, "-c", _NVML_TABLE], DRIVER_SECONDS)
    if code == _NO_PYNVML and has_program:
        fields = "index,uuid,name,memory.total,memory.free,driver_version"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        code, out = output_within(command, DRIVER_SECONDS)
    if code is None:
        return f"{UNREADABLE}the GPU driver does not answer within {DRIVER_SECONDS:g} seconds"
    return out if code == 0 else ""


def output_within(command: list[str], seconds: float) -> tuple[int | None, str]:
    """A command's exit code and output; None for a code where it has not ended in time, and is given up."""
    with tempfile.TemporaryFile() as output:
        try:
            # Into a file: a pipe would be waited for as long as a descendant of the command holds it.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.DEVNULL, start_new_session=True
            )
        except OSError:
            return 127, ""
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            # A process inside a driver that hangs does not end; it is not waited for.
            os.killpg(process.pid, signal.SIGKILL)
            return None, ""
        output.seek(0)
        return process.returncode, output.read().decode(errors="replace")


def memory() -> MemoryFacts:
    """What this host's processes can use of its memory."""
    total_bytes, free_bytes = _machine_memory()
    locked_bytes = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    adapters = Path("/sys/class/infiniband")
    return {
        "total_bytes": total_bytes,
        "free_bytes": free_bytes,
        "limit": container_limit(total_bytes),
        "shared_memory": disk("/dev/shm"),
        "locked_bytes": None if locked_bytes == resource.RLIM_INFINITY else locked_bytes,
        "infiniband": sorted(item.name for item in adapters.iterdir()) if adapters.is_dir() else [],
    }


def _machine_memory() -> tuple[int, int]:
    """Bytes of the machine's memory: total, and available to a new process."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(lines[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    return total, available


def container_limit(total_bytes: int, root: str | Path = "/") -> MemoryLimit | None:
    """The limit of this process's memory with the least free bytes, over all of its control groups, version 1 or 2.

    Args:
        total_bytes: of the machine; a limit that is not lower is none.
        root: folder in which /proc and /sys lie.

    Returns:
        None without a limit.
    """
    tightest: MemoryLimit | None = None
    for folder, names in _memory_groups(Path(root)):
        limit, usage, reclaimable = _number(folder / names[0]), _number(folder / names[1]), 0
        if limit is None or limit >= total_bytes:
            continue
        for line in _lines(folder / "memory.stat"):
            # The page cache is dropped before the limit is reached.
            if line.startswith(f"{names[2]} "):
                reclaimable = int(line.split()[1])
        free_bytes = max(0, limit - max(0, (usage or 0) - reclaimable))
        if tightest is None or free_bytes < tightest["free_bytes"]:
            tightest = {"limit_bytes": limit, "free_bytes": free_bytes, "file": str(folder / names[0])}
    return tightest


def _memory_groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folders of this process's control groups for memory, up to the root, with the names of their files."""
    own = dict(line.split(":", 2)[1:] for line in _lines(root / "proc/self/cgroup") if line.count(":") >= 2)
    version_1 = next((path for names, path in own.items() if "memory" in names.split(",")), None)
    for line in _lines(root / "proc/self/mountinfo"):
        # proc(5): field 3 is the root within the file system, 4 the mount point; behind " - " type and options.
        before, _, after = line.partition(" - ")
        words = before.split()
        kind, _, options = [*after.split(" ", 2), "", ""][:3]
        if kind == "cgroup2":
            path, names = own.get(""), ("memory.max", "memory.current", "inactive_file")
        elif kind == "cgroup" and "memory" in options.split(","):
            path, names = version_1, ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        if path is None or len(words) < 5:
            continue
        mounted_root, point = words[3], root / words[4].lstrip("/")
        # In a container that sees its own group alone, the path is that of the machine.
        below = path.removeprefix(mounted_root) if path.startswith(mounted_root) else path
        folder = point / below.strip("/")
        folder = folder if folder.is_dir() else point
        while True:
            yield folder, names
            if folder == point:
                break
            folder = folder.parent


def _number(path: Path) -> int | None:
    """The number in a file; None for `max`, or without one."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


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
