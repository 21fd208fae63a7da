"""Runs through `launch`: stopped by another process, and watched from another host while they load for long."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from training_runs import config_of

from hynb.errors import ConfigError, RunError
from hynb.files import read_json, write_json
from hynb.launch import Run, attach, launch
from hynb.runs import RunDir, RunReader
from hynb.supervision import processes_of

# A model that, while it is created, holds the GIL until somebody opens the FIFO for writing.
SLOW_MODEL = """
import ctypes
from transformers import HunYuanDenseV1Config, HunYuanDenseV1ForCausalLM

class SlowConfig(HunYuanDenseV1Config):
    model_type = "slow"

class SlowModel(HunYuanDenseV1ForCausalLM):
    config_class = SlowConfig

    def __init__(self, config):
        ctypes.PyDLL(None).open({fifo!r}, 0)
        super().__init__(config)
"""


def until(condition: Callable[[], object], run: Run, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and run.status().live, f"{run.status()}\n{run.reader.log_tail()}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def long_run(files, tmp_path_factory):
    """A run that would go on for hours."""
    config = config_of(files, "hunyuan", tmp_path_factory.mktemp("long") / "run", max_steps=100_000)
    run = launch(config.replace(save_steps=100_000, train_attention_params_only=True))
    until(lambda: run.status().global_step >= 2, run)
    yield config, run
    if run.status().live:
        run.kill()


def test_stop_saves_a_checkpoint_and_a_second_launch_is_refused(long_run):
    config, run = long_run
    assert run.status().state == "running", run.reader.log_tail()
    with pytest.raises(ConfigError, match="hynb stop"):
        launch(config)
    # From a process that never saw the launch, as after a restart of the kernel.
    cli = [sys.executable, "-m", "hynb.cli"]
    shown = subprocess.run([*cli, "status", run.output_dir], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("running, step")
    stopped = subprocess.run([*cli, "stop", run.output_dir], capture_output=True, text=True, check=True, timeout=300)
    assert "stopped on request after a checkpoint" in stopped.stdout
    status = attach(run.output_dir).status()
    assert status.state == "stopped" and status.global_step >= 2
    assert run.checkpoints()[-1].name == f"checkpoint-{status.global_step}"
    launch_id = (read_json(run.dir.launch) or {})["id"]
    deadline = time.monotonic() + 30
    while processes_of(launch_id) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(launch_id) == [], "the guard and the heartbeat have ended too"
    with pytest.raises(ConfigError, match="overwrite_output_dir"):
        launch(config)


def test_only_attention_was_trained(long_run, files):
    _, run = long_run
    assert run.status().state == "stopped"
    before = load_file(files["hunyuan"] / "model.safetensors")
    after = load_file(run.checkpoints()[-1] / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".self_attn." in name for name in changed)
    assert changed == {name for name in before if ".self_attn." in name}


def test_a_run_that_loads_for_long_is_alive_on_every_host(files, tmp_path, monkeypatch):
    fifo, model = tmp_path / "fifo", shutil.copytree(files["hunyuan_v1_dense"], tmp_path / "model")
    os.mkfifo(fifo)
    (model / "slow.py").write_text(SLOW_MODEL.format(fifo=str(fifo).encode()))
    auto_map = {"AutoConfig": "slow.SlowConfig", "AutoModelForCausalLM": "slow.SlowModel"}
    settings = (read_json(model / "config.json") or {}) | {"model_type": "slow", "auto_map": auto_map}
    write_json(model / "config.json", settings)
    config = config_of(files, "hunyuan_v1_dense", tmp_path / "run", num_processes=1, max_steps=1, save_strategy="no")
    config = config.replace(model_name_or_path=str(model), trust_remote_code=True)
    run = launch(config)
    try:
        until(lambda: run.status().phase == "loading", run)
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
        reader, beats = RunReader(run.output_dir), set()
        # Two more beats, while the process cannot run a line of Python: it would be alive for an hour as well.
        deadline = time.monotonic() + 120
        while len(beats) < 3:
            assert time.monotonic() < deadline
            status = reader.status()
            assert status.live and status.phase == "loading" and "loading" in str(status)
            beats.add(run.dir.heartbeat.stat().st_mtime)
            time.sleep(0.05)
        files_before = {path.name for path in run.output_dir.iterdir() if not path.name.startswith(".")}
        with pytest.raises(ConfigError, match=r"has a live run \(starting, loading\)"):
            launch(config.replace(overwrite_output_dir=True))
        assert {path.name for path in run.output_dir.iterdir()} >= files_before
        monkeypatch.undo()
        with fifo.open("wb"):
            assert run.wait(timeout_seconds=180, check=True).state == "finished"
    finally:
        if run.status().live:
            run.kill()


def test_a_second_launch_at_the_same_moment_is_refused(files, tmp_path):
    from hynb.launch import _launch_lock

    config = config_of(files, "hunyuan", tmp_path / "run")
    (tmp_path / "run").mkdir()
    with _launch_lock(RunDir(tmp_path / "run")), pytest.raises(RunError, match="another launch"):
        launch(config)
