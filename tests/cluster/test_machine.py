"""This machine's description, the table of its GPUs, and the devices that a user chose."""

from __future__ import annotations

import sys

import pytest

from hynb.cluster import PACKAGES, Gpu, Host, chosen_devices, parse_gpus, this_machine
from hynb.errors import ClusterError

TABLE = """0, GPU-aaaa-1, NVIDIA H20, 97871, 97000, 550.54.15
1, GPU-bbbb-2, NVIDIA H20, 97871, 12, 550.54.15
2, GPU-cccc-3, NVIDIA GB10, [N/A], [N/A], 580.95.05
"""


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, [0, 1, 2]),
        ("1", [1]),
        ("GPU-cccc", [2]),
        ("2, 0", [2, 0]),
        ("", []),
        ("-1", []),
        ("2,-1,0", [2]),
        ("7", []),
    ],
)
def test_gpus_are_those_that_a_run_would_see(visible, indices):
    assert [gpu.index for gpu in parse_gpus(TABLE, visible)] == indices


def test_a_gpu_is_read_with_its_memory_in_bytes():
    first, _, shared = parse_gpus(TABLE, None)
    assert first == Gpu(
        index=0, name="NVIDIA H20", memory_bytes=97871 << 20, free_bytes=97000 << 20, driver="550.54.15"
    )
    assert shared.memory_bytes == 0


@pytest.mark.parametrize(
    ("host", "visible", "devices"),
    [
        (Host(name="a", slots=2), None, None),
        (Host(name="a", slots=2), "4,5", ("4", "5")),
        (Host(name="a", slots=2), "GPU-1, MIG-2,7", ("GPU-1", "MIG-2")),
        (Host(name="a", slots=2, slot_ids=(0, 2)), "4,5,6", ("4", "6")),
        (Host(name="a", slots=2), "", ()),
        (Host(name="a", slots=2), "-1", ()),
    ],
)
def test_slots_are_devices_that_the_user_made_visible(host, visible, devices):
    assert chosen_devices(host, visible) == devices


@pytest.mark.parametrize("visible", ["4", "4,-1,5"])
def test_more_slots_than_visible_devices_are_refused(visible):
    with pytest.raises(
        ClusterError, match=f"a: slot 1 .*CUDA_VISIBLE_DEVICES={visible} there names 1 devices.*slots=1"
    ):
        chosen_devices(Host(name="a", slots=2), visible)


def test_this_machine_with_a_folder_that_does_not_exist_yet(tmp_path):
    machine = this_machine(tmp_path / "runs" / "first")
    assert machine.cpu_cores >= 1 and machine.slots >= 1
    assert 0 < machine.memory_free_bytes <= machine.memory_bytes
    assert machine.disk_free_bytes > 0
    assert set(machine.versions) == set(PACKAGES)
    assert machine.versions["torch"][0].isdigit()
    assert machine.python == ".".join(map(str, sys.version_info[:3]))
