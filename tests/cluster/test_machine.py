"""This machine's description, and nvidia-smi's table."""

from __future__ import annotations

import sys

import pytest

from hynb.cluster import PACKAGES, Gpu, parse_gpus, this_machine

TABLE = """0, GPU-aaaa-1, NVIDIA H20, 97871, 97000, 550.54.15
1, GPU-bbbb-2, NVIDIA H20, 97871, 12, 550.54.15
2, GPU-cccc-3, NVIDIA GB10, [N/A], [N/A], 580.95.05
"""


@pytest.mark.parametrize(
    ("visible", "indices"),
    [(None, [0, 1, 2]), ("1", [1]), ("GPU-cccc", [2]), ("2, 0", [0, 2]), ("", []), ("-1", [])],
)
def test_gpus_are_those_that_a_run_would_see(visible, indices):
    assert [gpu.index for gpu in parse_gpus(TABLE, visible)] == indices


def test_a_gpu_is_read_with_its_memory_in_bytes():
    first, _, shared = parse_gpus(TABLE, None)
    assert first == Gpu(
        index=0, name="NVIDIA H20", memory_bytes=97871 << 20, free_bytes=97000 << 20, driver="550.54.15"
    )
    assert shared.memory_bytes == 0


def test_this_machine_with_a_folder_that_does_not_exist_yet(tmp_path):
    machine = this_machine(tmp_path / "runs" / "first")
    assert machine.cpu_cores >= 1 and machine.slots >= 1
    assert 0 < machine.memory_free_bytes <= machine.memory_bytes
    assert machine.disk_free_bytes > 0
    assert set(machine.versions) == set(PACKAGES)
    assert machine.versions["torch"][0].isdigit()
    assert machine.python == ".".join(map(str, sys.version_info[:3]))
