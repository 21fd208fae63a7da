"""Tokens, time by part and memory of each rank; the stop request that reaches all ranks at the same step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_runs import config_of

from hynb.cluster import peak_flops
from hynb.plan import memory
from hynb.runs import RunDir, request_stop
from hynb.train import Pace
from hynb.train.stop_flag import StopFlag


def slow_batches() -> Iterator[str]:
    time.sleep(0.1)
    yield "batch"


def test_what_a_report_holds():
    pace = Pace(flops_per_token=6e9, peak_flops=1e12)
    step = pace.timed(lambda: time.sleep(0.05))
    for _ in range(2):
        assert list(pace.reading(slow_batches())) == ["batch"]
        pace.add_tokens(torch.tensor(300))
        pace.add_tokens(200)
        step()
    found, counts = pace.report(2, torch.device("cpu"), torch.tensor([1.0, 2.0]))
    assert counts.tolist() == [1.0, 2.0]
    assert found["tokens"] == 1000
    assert found["tokens_per_second"] == pytest.approx(1000 / (2 * found["step_seconds"]), rel=1e-2)
    assert found["tokens_per_second_per_rank"] == found["tokens_per_second"]
    parts = found["seconds_by_part"]
    assert parts["data"] >= 0.1 and parts["optimizer"] >= 0.05
    assert sum(parts.values()) == pytest.approx(found["step_seconds"], abs=1e-3)
    assert found["mfu"] == pytest.approx(found["tokens_per_second"] * 6e9 / 1e12, abs=1e-3)
    assert found["memory_rank"] == 0 and found["memory_bytes_per_rank"] == [found["memory_bytes"]]
    pace.add_tokens(10)
    again, _ = pace.report(3, torch.device("cpu"), None)
    assert again["tokens"] == 1010 and again["seconds_by_part"]["data"] == 0.0, "each report starts anew"


def test_time_without_training_is_left_out():
    pace = Pace()
    pace.add_tokens(100)
    time.sleep(0.2)
    # More than this step can have taken, however busy the machine is.
    pace.pause(600)
    found, _ = pace.report(1, torch.device("cpu"), None)
    assert found["step_seconds"] < 0.2 and "mfu" not in found


def test_a_resumed_run_counts_from_its_own_first_step():
    pace = Pace()
    pace.add_tokens(1000)
    pace.attach(torch.nn.Linear(1, 1), 1000)
    time.sleep(0.2)
    pace.add_tokens(100)
    found, _ = pace.report(1001, torch.device("cpu"), None)
    assert found["step_seconds"] >= 0.2 and found["tokens"] == 100


def test_events_of_two_ranks(files, ranks, tmp_path):
    values = {"deepspeed": "ds_zero3_offload", "max_steps": 4, "save_steps": 2}
    run = ranks.train(config_of(files, "hunyuan_v1_moe", tmp_path / "run", **values))
    logs = [event for event in run.events() if event["kind"] == "log"]
    assert len(logs) == 4
    for event in logs:
        assert event["tokens_per_second_per_rank"] == pytest.approx(event["tokens_per_second"] / 2, abs=0.02)
        assert len(event["memory_bytes_per_rank"]) == 2
        assert event["memory_bytes"] == event["memory_bytes_per_rank"][event["memory_rank"]] > 1e8
        parts = event["seconds_by_part"]
        assert 0 < parts["optimizer"] < event["step_seconds"] and parts["forward and backward"] > 0
    assert logs[-1]["tokens"] > logs[0]["tokens"] > 0
    for event in [event for event in run.events() if event["kind"] == "save"]:
        checkpoint = Path(run.output_dir, event["path"])
        sizes = event["bytes_by_part"]
        assert sizes["weights"] == (checkpoint / "model.safetensors").stat().st_size
        for part, end in (("module states", "_model_states.pt"), ("optimizer", "_optim_states.pt")):
            files_of_ranks = list(checkpoint.rglob(f"*{end}"))
            assert len(files_of_ranks) == 2, "one of each rank"
            assert sizes[part] == sum(path.stat().st_size for path in files_of_ranks)
        assert sizes["optimizer"] > 2 * sizes["weights"], "a float32 weight and two moments of each parameter"
        assert sum(sizes.values()) == sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        assert 0 < sizes["other"] < 1e7
        assert event["seconds_by_part"].keys() == {"weights", "optimizer", "digests"}


def test_peaks_of_gpus_as_the_driver_names_them():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H20") == 148e12 and peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165.2e12
    assert peak_flops("NVIDIA B300 SXM6 AC") == 2250e12 and peak_flops("NVIDIA GB300") == 2500e12
    assert peak_flops("NVIDIA A10G") == 70e12 and peak_flops("NVIDIA A10") == 125e12
    assert peak_flops("NVIDIA RTX A6000") == 154.8e12
    assert peak_flops("Tesla V100-SXM2-32GB") == 125e12 and peak_flops("Tesla V100-PCIE-16GB") == 112e12
    assert peak_flops("Tesla K80") is None
    assert peak_flops("NVIDIA A100-SXM4-40GB MIG 1g.5gb") is None, "a part of a GPU"


def test_parameters_that_a_token_is_multiplied_by(shared):
    """Published: 52 of 389 billion, 13 of 80 billion."""
    import json

    for model, file, billions in (
        ("hunyuan-large", "config_reconstructed.json", 52),
        ("hunyuan-a13b", "config.json", 13),
    ):
        count = memory.count_parameters(json.loads((shared / "models" / model / file).read_text()))
        assert count.active / 1e9 == pytest.approx(billions, abs=1)
        assert count.multiplied <= count.active


def test_one_process_stops_at_once(tmp_path):
    run_dir, termination = RunDir(tmp_path), SimpleNamespace(noted=False)
    flag = StopFlag(run_dir, termination)
    assert not flag.is_set() and not flag.finish()
    request_stop(run_dir, "by SIGTERM to its supervisor")
    request_stop(run_dir, "on request")
    time.sleep(0.6)
    assert flag.is_set() and flag.cause() == "by SIGTERM to its supervisor"
    termination.noted = True
    assert flag.is_set() and flag.cause() == "by SIGTERM to its rank"
