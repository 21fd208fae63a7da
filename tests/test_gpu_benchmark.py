"""The GPU report at tiny sizes on a CPU: each part runs, and one that fails or hangs is a line of the report."""

from __future__ import annotations

import importlib.util
import os
import re
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


def report(*words: str) -> str:
    done = subprocess.run([sys.executable, SCRIPT, "--cpu", *words], capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    return done.stdout


def section(text: str, title: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    (body,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return [line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("|")][2:]


def test_all_parts_run_on_a_cpu():
    text = report("--minutes", "9")
    assert "FAILED" not in text and "LEFT OUT" not in text, text
    assert "torch 2." in text and re.search(r"date: \d{4}-\d\d-\d\d", text)
    (experts,) = section(text, "Routed experts")
    assert experts[2].endswith(" ms") and all(cell.endswith("×") for cell in experts[5:]), experts
    attention = section(text, "Attention")
    assert {cells[2] for cells in attention} == {"transformers' sdpa", "sdpa", "flash_attention_2"}
    differences = [float(cells[-1]) for cells in attention if cells[2] == "sdpa"]
    assert len(differences) == 2 and max(differences) < 0.05, attention
    parity = section(text, "bfloat16 and float32")
    assert len(parity) == 4 and all(float(cells[-1]) > 0.99 for cells in parity), parity
    assert [cells[0] for cells in section(text, "Loading and saving")][1:] == ["write_model"]
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
    assert "device: LEFT OUT" in text and "training ds_zero2_no_offload LoRA: LEFT OUT" in text


def test_every_combination_is_measured_on_a_gpu(gpu, tmp_path):
    parts = gpu.parts(gpu.Settings(cpu=False, work=tmp_path))
    runs = {part.arguments for part in parts if part.name == "training"}
    assert len(runs) == 12 and {kind for _, kind in runs} == {"LoRA", "full"}
