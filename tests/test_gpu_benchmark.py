"""The GPU report at tiny sizes on a CPU: each part runs, and one that fails or hangs is a line of the report."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_benchmark", module)
    spec.loader.exec_module(module)
    return module


def report(*words: str, script: Path = SCRIPT) -> str:
    done = subprocess.run([sys.executable, script, "--cpu", *words], capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    return done.stdout


def section(text: str, title: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    (body,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return [line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("|")][2:]


def test_all_parts_run_on_a_cpu(tmp_path):
    # A copy, as the script is one file that needs no other benchmark.
    text = report("--minutes", "9", script=Path(shutil.copy(SCRIPT, tmp_path)))
    assert "FAILED" not in text and "LEFT OUT" not in text, text
    assert "torch 2." in text and re.search(r"date: \d{4}-\d\d-\d\d", text)
    (experts,) = section(text, "Routed experts")
    assert experts[2].endswith(" ms") and len(experts) == 9, experts
    assert all(experts[place].endswith("×") for place in (5, 7, 8)), experts
    attention = section(text, "Attention")
    assert {cells[2] for cells in attention} == {"transformers' sdpa", "sdpa", "flash_attention_2"}
    differences = [float(cells[-1]) for cells in attention if cells[2] == "sdpa"]
    assert len(differences) == 2 and max(differences) < 0.05, attention
    parity = section(text, "bfloat16 and float32")
    assert len(parity) == 4 and all(float(cells[-1]) > 0.99 for cells in parity), parity
    loading_and_saving = section(text, "Loading and saving")
    assert [cells[0] for cells in loading_and_saving] == ["load_model", "write_model"]
    assert [cells[3].split(" × ")[1] for cells in loading_and_saving] == ["cat", "cp"]
    (training,) = section(text, "Training, 1 GPU")
    # PyTorch's flex attention has no backward pass on a CPU.
    assert [cells[2] for cells in section(text, "Flex attention")][1::2] == ["flex_attention"] * 2
    assert training[:2] == ["LoRA", "ds_zero2_no_offload"] and len(training) == 11


def test_a_part_that_fails_is_a_line_and_the_next_part_runs():
    # Without the part that writes the model.
    text = report("--only", "files", "device")
    assert re.search(r"^files: FAILED, exit code 1: .*model", text, re.MULTILINE), text
    assert text.index("## Device") < text.index("FAILED") < text.index(" minutes.")


def test_a_part_that_hangs_is_ended_with_all_its_processes(gpu, tmp_path, monkeypatch, capsys):
    script = tmp_path / "hangs.py"
    script.write_text(
        "import subprocess, sys, pathlib\n"
        "print('before', flush=True)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "child.wait()\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    part = gpu.Part(name="experts", title="Routed experts", run=gpu.experts, limit_seconds=10)
    gpu.run_part(part, gpu.Settings(cpu=True, work=tmp_path), 10)
    assert capsys.readouterr().out.strip().splitlines() == [
        "before",
        "",
        "experts: FAILED, not ended after 10 seconds: no message",
    ]
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 60
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z" and os.getpgid(pid) > 0
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_parts_beyond_the_time_are_named():
    text = report("--only", "device", "training", "--minutes", "0.01")
    assert "\ndevice: LEFT OUT" in text
    (training,) = section(text, "Training, 1 GPU")
    assert training[0].startswith("training ds_zero2_no_offload LoRA: LEFT OUT") and len(training) == 11, text


def test_every_combination_is_measured_on_a_gpu(gpu, tmp_path):
    parts = gpu.parts(gpu.Settings(cpu=False, work=tmp_path))
    runs = {part.arguments for part in parts if part.name == "training"}
    assert len(runs) == 12 and {kind for _, kind in runs} == {"LoRA", "full"}


def test_a_share_of_the_peak_is_of_the_operations_per_second(gpu):
    assert gpu.share_of(100e12, 3e12, 0.1) == "30%" and gpu.share_of(None, 3e12, 0.1) == "unknown"


def test_a_folder_in_memory_is_warned_of(gpu, tmp_path):
    shared = Path("/dev/shm")
    if not shared.is_dir() or gpu.file_system(shared) != "tmpfs":
        pytest.skip("this machine has no tmpfs at /dev/shm")
    assert "--folder" in gpu.in_memory_warning(shared / "model")
    if gpu.file_system(tmp_path) not in ("tmpfs", "ramfs"):
        assert not gpu.in_memory_warning(tmp_path)


def test_ways_take_turns_and_the_first_round_counts_for_nothing(gpu, tmp_path):
    order, made = [], tmp_path / "made"

    def way(name: str):
        def run() -> float:
            made.mkdir(exist_ok=True)
            order.append(name)
            return float(len(order))

        return run

    found = gpu.in_turns({"ours": way("ours"), "cp": way("cp")}, [("ours", "cp")], [made], limit_seconds=1e6)
    assert order == ["ours", "cp", "cp", "ours"] * 2
    assert found == {"ours": [4.0, 5.0, 8.0], "cp": [3.0, 6.0, 7.0]} and not made.exists()
    order.clear()
    assert len(gpu.in_turns({"cp": way("cp")}, [("cp",)], [made], limit_seconds=0)["cp"]) == 1
