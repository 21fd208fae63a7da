"""The facts that a host reports: hashes of files, network interfaces, and the script that is sent to other hosts."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import need_programs

from hynb.cluster import FactsRequest, host_facts


def test_a_change_at_the_end_of_a_large_file_changes_its_hash(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)) * 40_000)
    whole = host_facts.file_hash(path)
    monkeypatch.setattr(host_facts, "WHOLE_BYTES", 1000)
    sampled = host_facts.file_hash(path)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert sampled != whole and host_facts.file_hash(path) != sampled


def test_what_does_not_exist_has_no_hash(tmp_path):
    assert host_facts.file_hash(tmp_path / "none") is None
    assert host_facts.folder_hash(tmp_path) is None
    assert host_facts.code_hash(tmp_path / "none") is None


def test_the_hash_of_code_covers_modules_and_stubs(tmp_path):
    hashes = [host_facts.code_hash(tmp_path)]
    for name in ("a.py", "__init__.pyi"):
        (tmp_path / name).write_text("x = 1\n")
        hashes.append(host_facts.code_hash(tmp_path))
    (tmp_path / "a.pyc").write_text("")
    assert len(set(hashes)) == 3 and host_facts.code_hash(tmp_path) == hashes[-1]


def test_the_script_needs_the_standard_library_alone(tmp_path):
    """Run as on another host: from standard input, by an interpreter without site-packages and in another folder."""
    data = tmp_path / "it's $(touch data).jsonl"
    data.write_text("{}\n")
    request: FactsRequest = {
        "packages": ["torch"],
        "code": str(tmp_path),
        "output_dir": str(tmp_path / "runs" / "first"),
        "model": None,
        "data": [str(data), str(tmp_path / "none")],
        "token": str(data),
        "addresses": ["127.0.0.1"],
        "connect": {},
        "login": {"beta": ["false"], "gamma": ["no-such-program"]},
    }
    done = subprocess.run(
        [sys.executable, "-S", "-"],
        input=host_facts.script_for(request),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    facts = host_facts.parse_output("welcome\n" + done.stdout)
    assert facts is not None
    assert facts["versions"] == {"torch": "not installed"}
    assert facts["data"] == {str(data): host_facts.file_hash(data), str(tmp_path / "none"): None}
    assert facts["sees_token"] and facts["routes"] == {"127.0.0.1": "127.0.0.1"}
    assert facts["output_disk"]["folder"] == str(tmp_path) and facts["output_disk"]["writable"]
    assert facts["logins"]["beta"] == "refused" and "no-such-program" in facts["logins"]["gamma"]
    assert [path.name for path in tmp_path.iterdir()] == [data.name]
    assert host_facts.parse_output("welcome\n") is None


GB = 1 << 30
NO_LIMIT = str((1 << 63) - 4096)


def groups(root: Path, cgroup: str, mounts: str, files: dict[str, str]) -> Path:
    """A folder with the /proc and /sys of a process in control groups."""
    content = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mounts} | files
    for name, text in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "34 31 0:31 / /sys/fs/cgroup/memory rw,relatime shared:15 - cgroup cgroup rw,memory"
V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def v2(folder: str, limit: str, current: int, inactive: int = 0) -> dict[str, str]:
    stat = f"anon 1\ninactive_file {inactive}\nactive_file 7"
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": str(current), f"{folder}/memory.stat": stat}


def v1(folder: str, limit: str, usage: int, inactive: int = 0) -> dict[str, str]:
    stat = f"cache 1\ninactive_file 1\ntotal_inactive_file {inactive}"
    values = {f"{folder}/{name}": str(value) for name, value in zip(V1_FILES, (limit, usage), strict=True)}
    return values | {f"{folder}/memory.stat": stat}


SYS = "sys/fs/cgroup"
LIMITS = {
    "no control groups": ("", "", {}, None),
    "version 2 without a limit": ("0::/", V2, v2(SYS, "max", 5 * GB), None),
    "version 2, in its own namespace": ("0::/", V2, v2(SYS, str(64 * GB), 10 * GB), (64, 54, f"{SYS}/memory.max")),
    "version 2, page cache counts as free": (
        *("0::/", V2, v2(SYS, str(64 * GB), 60 * GB, inactive=50 * GB)),
        (64, 54, f"{SYS}/memory.max"),
    ),
    "version 2, nested: the tightest counts": (
        *("0::/pod/job/step", V2),
        v2(f"{SYS}/pod", str(100 * GB), 90 * GB)
        | v2(f"{SYS}/pod/job", str(32 * GB), 2 * GB)
        | v2(f"{SYS}/pod/job/step", "max", 1 * GB),
        (100, 10, f"{SYS}/pod/memory.max"),
    ),
    "version 2, mounted below the machine's root": (
        *("0::/docker/abc/inner", V2.replace(" / ", " /docker/abc ")),
        v2(f"{SYS}/inner", str(16 * GB), 0),
        (16, 16, f"{SYS}/inner/memory.max"),
    ),
    "version 2, of a container that sees its own group alone": (
        *("0::/../../elsewhere", V2, v2(SYS, str(16 * GB), 4 * GB)),
        (16, 12, f"{SYS}/memory.max"),
    ),
    "version 1": (
        *("5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/", V1),
        v1(f"{SYS}/memory/docker/abc", str(48 * GB), 8 * GB, inactive=3 * GB) | v1(f"{SYS}/memory", NO_LIMIT, 9 * GB),
        (48, 43, f"{SYS}/memory/docker/abc/memory.limit_in_bytes"),
    ),
    "version 1 without a limit": ("4:memory:/a", V1, v1(f"{SYS}/memory/a", NO_LIMIT, GB), None),
    "version 1 beside an empty version 2": (
        *("4:memory:/a\n0::/", f"{V1}\n" + V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")),
        v1(f"{SYS}/memory/a", str(8 * GB), 9 * GB) | {f"{SYS}/unified/cgroup.procs": ""},
        (8, 0, f"{SYS}/memory/a/memory.limit_in_bytes"),
    ),
    "a limit above the machine's memory": ("0::/", V2, v2(SYS, str(4096 * GB), GB), None),
}


@pytest.mark.parametrize("case", LIMITS)
def test_the_limit_of_a_container(case, tmp_path):
    cgroup, mounts, files, expected = LIMITS[case]
    found = host_facts.container_limit(1024 * GB, groups(tmp_path, cgroup, mounts, files))
    if expected is None:
        assert found is None
    else:
        limit, free, file = expected
        assert found == {"limit_bytes": limit * GB, "free_bytes": free * GB, "file": str(tmp_path / file)}


def test_the_memory_of_this_machine_by_a_script(tmp_path):
    done = subprocess.run(
        [sys.executable, "-S", "-"],
        input=host_facts.memory_script(),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20)),
    )
    found = host_facts.parse_memory("welcome\n" + done.stdout)
    assert found is not None and found["locked_bytes"] == 1 << 20
    assert 0 < found["free_bytes"] <= found["total_bytes"]
    assert found["shared_memory"]["folder"] == "/dev/shm"


def test_interfaces_are_the_same_with_and_without_ip():
    need_programs("ip")
    found = host_facts.interfaces_of_kernel()
    assert "127.0.0.1" in found["lo"] and set(found) == set(host_facts.interfaces())
