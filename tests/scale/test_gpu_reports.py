"""What the drivers of GPUs report that this machine does not have: NVML and nvidia-smi, devices of MIG, no answer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from hynb.cluster import gpu_count, host_facts, this_machine
from hynb.errors import ClusterError

TABLE = """0, GPU-aaaa-1, NVIDIA H20, 97871, 97000, 550.54.15
1, GPU-bbbb-2, NVIDIA H20, 97871, 12, 550.54.15
2, GPU-cccc-3, NVIDIA GB10, [N/A], [N/A], 580.95.05
"""

# Of a package of this name; `hang` waits in the driver for ever.
PYNVML = """
import os, time
class NVMLError(Exception):
    pass
class Memory:
    total, free = 80 << 30, 79 << 30
class Part:
    total, free = 10 << 30, 9 << 30
def nvmlInit():
    if os.environ["FAKE"] == "hang":
        time.sleep(10_000)
    if os.environ["FAKE"] == "no driver":
        raise NVMLError("Driver Not Loaded")
def nvmlSystemGetDriverVersion():
    return "570.1"
def nvmlDeviceGetCount():
    return 3
def nvmlDeviceGetHandleByIndex(index):
    return str(index)
def nvmlDeviceGetName(handle):
    return b"NVIDIA H100"
def nvmlDeviceGetUUID(handle):
    return f"MIG-{handle}" if "." in handle else f"GPU-{handle}"
def nvmlDeviceGetMemoryInfo(handle):
    return Part if "." in handle else Memory
def nvmlDeviceGetMigMode(handle):
    if handle == "2":
        raise NVMLError("Not Supported")
    return (1, 1) if handle == "1" else (0, 0)
def nvmlDeviceGetMaxMigDeviceCount(handle):
    return 7
def nvmlDeviceGetMigDeviceHandleByIndex(handle, part):
    if part > 1:
        raise NVMLError("Not Found")
    return f"{handle}.{part}"
"""
NO_PYNVML = "raise ImportError('none')"
SMI = f"#!/bin/sh\ncat <<END\n{TABLE}END\n"
SMI_HANGS = "#!/bin/sh\nsleep 10000\n"


@pytest.fixture
def reports(tmp_path, monkeypatch) -> Callable[..., None]:
    """Puts what a GPU's driver reports in place of this machine's."""

    def report(*, fake: str = "", pynvml: str = PYNVML, smi: str = SMI_HANGS) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setenv("FAKE", fake)
        (tmp_path / "pynvml.py").write_text(pynvml)
        (tmp_path / "nvidia-smi").write_text(smi)
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(host_facts, "DRIVER_SECONDS", 2.0 if "hang" in fake else 60.0)

    return report


def test_nvml_reports_gpus_and_mig_devices(reports, monkeypatch):
    reports()
    assert host_facts.gpu_table().splitlines() == [
        "0, GPU-0, NVIDIA H100, 81920, 80896, 570.1",
        "1, GPU-1, NVIDIA H100, 81920, 80896, 570.1",
        "1, MIG-1.0, NVIDIA H100 MIG, 10240, 9216, 570.1",
        "1, MIG-1.1, NVIDIA H100 MIG, 10240, 9216, 570.1",
        "2, GPU-2, NVIDIA H100, 81920, 80896, 570.1",
    ]
    assert gpu_count() == 3
    # Of a divided GPU a process sees the first part.
    assert [gpu.memory_bytes >> 30 for gpu in this_machine().gpus] == [80, 10, 80]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1.1,GPU-2")
    assert gpu_count() == 2
    assert [(gpu.index, gpu.memory_bytes >> 30) for gpu in this_machine().gpus] == [(1, 10), (2, 80)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_count() == 0 and this_machine().gpus == ()


def test_nvidia_smi_is_asked_where_there_is_no_nvml_package(reports):
    reports(pynvml=NO_PYNVML, smi=SMI)
    assert host_facts.gpu_table() == TABLE and gpu_count() == 3


@pytest.mark.parametrize("visible", ["0,99", "GPU-zzz", "99,0", "GPU-aaaa,MIG-x,GPU-zzz"])
def test_a_device_that_the_driver_does_not_have_is_named(reports, monkeypatch, visible):
    reports(pynvml=NO_PYNVML, smi=SMI)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    unknown = "99" if "99" in visible else "GPU-zzz"
    with pytest.raises(ClusterError, match=f"CUDA_VISIBLE_DEVICES={visible}: .* has no device {unknown}, .*0 NVIDIA"):
        gpu_count()
    # nvidia-smi lists no MIG devices.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,MIG-x,GPU-cccc")
    assert gpu_count() == 3


def test_what_deepspeeds_launcher_sets_on_a_cpu_is_no_gpu(reports, monkeypatch):
    reports(fake="no driver")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert gpu_count() == 0


def test_no_driver_means_no_gpus(reports):
    reports(fake="no driver")
    assert host_facts.gpu_table() == "" and gpu_count() == 0


@pytest.mark.parametrize("asked", ["NVML", "nvidia-smi"])
def test_a_driver_that_hangs_is_given_up_and_named(reports, asked, monkeypatch):
    """The program is a shell's child, which outlives it and holds its output."""
    reports(fake="hang", pynvml=PYNVML if asked == "NVML" else NO_PYNVML)
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"the GPU driver does not answer within 2 seconds.*nvidia-smi"):
        gpu_count()
    assert time.monotonic() - began < 60
    assert this_machine().gpus == (), "a description of the machine goes on without them"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_count() == 0, "as the message says"
