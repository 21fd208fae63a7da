"""Comparisons of hosts by their facts, for hardware that the test hosts do not have."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest

from hynb.cluster import Host, HostFacts, MemoryFacts, Ssh, hostfile
from hynb.cluster.host_facts import DiskFacts
from hynb.config import Config
from hynb.preflight.checks import compare
from hynb.preflight.report import Cell
from hynb.preflight.targets import Known, Reply, Target
from hynb.supervision import host_bytes

NOW = 1_000_000.0
SMALL_DISK = {"total_bytes": 64e6, "free_bytes": 64e6, "writable": True, "folder": "/dev/shm"}
ROW = "{}, GPU-{}, NVIDIA H20, 97871, {}, {}\n"
TWO_GPUS = ROW.format(0, 0, 97000, "550") + ROW.format(1, 1, 97000, "550")


def memory_facts(**changes: Any) -> MemoryFacts:
    """The memory of a host with enough of it."""
    disk: DiskFacts = {"total_bytes": 10**12, "free_bytes": 10**12, "writable": True, "folder": "/dev/shm"}
    facts: MemoryFacts = {
        "total_bytes": 10**12,
        "free_bytes": 10**12,
        "limit": None,
        "shared_memory": disk,
        "locked_bytes": None,
        "infiniband": [],
    }
    return cast(MemoryFacts, facts | changes)


def host_facts(gpus: str, **changes: Any) -> HostFacts:
    """The facts of a host with nothing wrong."""
    disk: DiskFacts = {"total_bytes": 10**12, "free_bytes": 10**12, "writable": True, "folder": "/"}
    facts: HostFacts = {
        "hostname": "host",
        "python": "3.11.7",
        "versions": {"torch": "2.13.0"},
        "cuda": {"cuda": "12.8", "nccl": "2.27.3"},
        "gpus": gpus,
        "cuda_visible_devices": None,
        "build_tools": dict.fromkeys(("compiler", "ninja", "python", "cuda", "libaio"), True),
        "cpu_cores": 64,
        "memory": memory_facts(),
        "output_disk": disk,
        "cache_disk": disk,
        "code": "x",
        "model": None,
        "data": {},
        "sees_token": False,
        "interfaces": {},
        "routes": {},
        "connections": {},
        "logins": {},
        "time": NOW,
        "elapsed_seconds": 0.0,
    }
    return cast(HostFacts, facts | changes)


def reply(
    name: str,
    facts: HostFacts,
    *,
    slots: int = 1,
    slot_ids: tuple[int, ...] | None = None,
    local: bool = False,
    address: str = "",
    requested_at: float = NOW,
    answered_at: float = NOW,
) -> Reply:
    host = Host(name=name, slots=slots, slot_ids=slot_ids)
    target = Target(host=host, local=local, address=address, port=22)
    return Reply(target=target, facts=facts, requested_at=requested_at, answered_at=answered_at)


def failed(compared: Reply, *others: Reply, config: Config | None = None, **changes: Any) -> list[Cell]:
    """The failed checks of a host that is compared with the first of the others, or with itself."""
    replies = [*others, compared]
    values = {"config": config or Config(), "ssh": Ssh(), "port": 29500, "port_taken_by": "", "data": []}
    known = Known(
        **cast(Any, values | changes),
        targets=[item.target for item in replies],
        replies=replies,
        reference=replies[0].facts,
    )
    return [cell for cell in compare(compared, known) if cell.state == "bad"]


def test_a_clock_is_compared_with_the_time_at_which_it_was_read():
    """The time that a host needs for hashing before it reads its clock is not an error of the clock."""
    facts = host_facts("", time=NOW + 30, elapsed_seconds=59.0)
    (cell,) = failed(reply("a", facts, answered_at=NOW + 60))
    assert cell.check == "clock" and cell.text.startswith("-29.0 s off")
    assert not failed(reply("a", host_facts("", time=NOW + 59.5, elapsed_seconds=59.0), answered_at=NOW + 60))


@pytest.mark.parametrize("line", ["b    slots=8  # new", "[b]:8,c:8", "c:8, b:8"])
def test_the_fix_reduces_slots_in_every_form_of_a_hostfile(line, tmp_path):
    path = tmp_path / "it's a $(hostfile)"
    path.write_text(f"a slots=8\n{line}\nbb slots=8\n")
    facts = host_facts(ROW.format(0, 0, 97000, "550"))
    (cell,) = failed(reply("b", facts, slots=8), config=Config(hostfile=str(path)))
    subprocess.run(["sh", "-c", cell.fix], check=True)
    slots = {host.name: host.slots for host in hostfile.read(path)}
    assert slots.pop("b") == 1 and set(slots.values()) == {8}


def test_gpus_that_are_not_selected_may_be_in_use():
    facts = host_facts(ROW.format(0, 0, 100, "550") + ROW.format(1, 1, 97000, "550"))
    assert not failed(reply("a", facts, slot_ids=(1,)))
    (cell,) = failed(reply("a", facts, slot_ids=(0,)))
    assert cell.text == "GPU 0: 103 of 103 GB in use"


@pytest.mark.parametrize(
    ("gpus", "changes", "check", "text", "fix"),
    [
        (TWO_GPUS, {}, "", "", ""),
        (ROW.format(0, 0, 97000, "550"), {}, "GPUs", "2 slots, but 1 GPU", "[0-9]+/\\1\\2\\31/' hosts"),
        ("", {}, "GPUs", "none, but a has some", "nvidia-smi"),
        (
            ROW.format(0, 0, 97000, "550") + ROW.format(1, 1, 50000, "550"),
            {},
            *("GPUs", "GPU 1: 50 of 103 GB in use", "nvidia-smi"),
        ),
        (
            ROW.format(0, 0, 97000, "535") + ROW.format(1, 1, 97000, "535"),
            {},
            *("versions", "driver 535, but 550 here", "apt-get install --only-upgrade 'nvidia-driver-*'"),
        ),
        (
            TWO_GPUS,
            {"cuda": {"cuda": "12.6", "nccl": "2.27.3"}},
            *("versions", "cuda 12.6, but 12.8 here", "make clean .venv"),
        ),
        (
            TWO_GPUS,
            {"memory": memory_facts(shared_memory=SMALL_DISK)},
            *("shared memory", "/dev/shm: 64 MB free, 512 MB needed", "mount -o remount,size=8G /dev/shm"),
        ),
        (
            TWO_GPUS,
            {"memory": memory_facts(locked_bytes=8 << 20, infiniband=["mlx5_0", "mlx5_1"])},
            *("locked memory", "may lock 8 MB (ulimit -l)", "/etc/security/limits.d"),
        ),
        (TWO_GPUS, {"memory": memory_facts(locked_bytes=8 << 20)}, "", "", ""),
        (
            "can't be read: the GPU driver does not answer",
            {},
            "GPUs",
            "does not answer",
            "nvidia-smi",
        ),
        (
            TWO_GPUS,
            {"memory": memory_facts(limit={"limit_bytes": 8e9, "free_bytes": 1.5e9, "file": "/sys/memory.max"})},
            *(
                "memory",
                "1.5 of the 8.0 GB that the container's limit (/sys/memory.max) allows are free",
                "memory.max",
            ),
        ),
        (
            TWO_GPUS,
            {"build_tools": {"ninja": True}},
            *("compiler", "cpu_adam (optimizer.type = AdamW, offloaded), and this host has no C++ compiler (c++)"),
            "apt-get install g++ python3-dev",
        ),
    ],
)
def test_hosts_with_gpus(gpus, changes, check, text, fix):
    first = reply("a", host_facts(TWO_GPUS), slots=2, local=True)
    config = Config(hostfile="hosts", use_lora=True, deepspeed="ds_zero3_offload")
    assert not failed(first, config=config)
    cells = failed(reply("b", host_facts(gpus, **changes), slots=2), first, config=config)
    assert [cell.check for cell in cells] == ([check] if check else [])
    for cell in cells:
        assert text in cell.text and fix in cell.fix


@pytest.mark.parametrize(("address", "program"), [("10.0.0.2", "iptables"), ("fd00::2", "ip6tables")])
def test_a_master_port_that_a_firewall_blocks(address, program):
    first = reply("a", host_facts(""), local=True, address="10.0.0.1")
    facts = host_facts("", connections={"master": "timed out"}, routes={"10.0.0.1": "10.0.0.2"})
    (cell,) = failed(reply("b", facts, address=address), first)
    assert cell.check == "master port" and cell.text == "29500 of this machine can't be reached: timed out"
    assert cell.fix == f"{program} -I INPUT -s {address} -j ACCEPT"


def test_copies_of_files_with_spaces_and_shell_syntax(tmp_path):
    """rsync gets each path as one argument, although a shell reads the command."""
    path, config = "/data/it's $(touch hit); a", Path("/a folder/$(touch hit)/ssh_config")
    first = reply("a", host_facts("", data={path: "1"}), local=True)
    (cell,) = failed(reply("b", host_facts("", data={path: "2"})), first, data=[path], ssh=Ssh(config=config))
    assert cell.text == f"differs from here: {path}"
    *_, option, shell, source, destination = shlex.split(cell.fix)
    assert option == "-e" and shlex.split(shell) == ["ssh", "-F", str(config)]
    assert source == path and destination == f"b:{path}"


@pytest.mark.parametrize(
    ("memory", "text"),
    [
        ({}, ""),
        ({"total_bytes": 256e9, "free_bytes": 250e9}, "250.0 of 256.0 GB are free, and this run takes {} GB"),
        (
            {"limit": {"limit_bytes": 128e9, "free_bytes": 127e9, "file": "/sys/fs/cgroup/memory.max"}},
            "127.0 of the 128.0 GB that the container's limit (/sys/fs/cgroup/memory.max) allows are free, and this "
            "run takes {} GB",
        ),
    ],
)
def test_the_plan_of_a_run_is_compared_with_each_hosts_memory(tmp_path, memory, text):
    """A model of 8 layers as those of Hunyuan-Large, 51 GB, whose optimizer and weights are in host memory."""
    sizes = {
        "model_type": "hunyuan",
        "hidden_size": 6400,
        "intermediate_size": 18304,
        "num_hidden_layers": 8,
        "num_attention_heads": 80,
        "num_key_value_heads": 8,
        "num_experts": 16,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "vocab_size": 128166,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    config = Config(model_name_or_path=str(tmp_path), deepspeed="ds_zero3_offload", hostfile="hosts")
    first = reply("a", host_facts(TWO_GPUS), slots=2, local=True)
    hosts = [Host(name="a", slots=2), Host(name="b", slots=2)]
    planned = host_bytes(config, hosts, slots=hosts[0].slots, on_gpus=True)
    assert planned is not None and 2.5e11 < planned < 9e11
    other = reply("b", host_facts(TWO_GPUS, memory=memory_facts(**memory)), slots=2)
    cells = [cell for cell in failed(other, first, config=config) if cell.check == "memory"]
    assert len(cells) == bool(text)
    for cell in cells:
        assert text.format(f"{planned / 1e9:.1f}") in cell.text and "choose a preset" in cell.text
