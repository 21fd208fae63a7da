"""Runs that start again by themselves: after SIGTERM to a rank, and on two hosts after the third is lost for good."""

from __future__ import annotations

import shutil
import signal

import pytest
from conftest import need
from hosts import many_hosts
from jobs import END_SECONDS, START_SECONDS, Job, made_ready
from tiny import tiny_data
from training_runs import config_of, losses, process_of
from waiting import wait_until

from hynb.config import Config
from hynb.launch import launch
from hynb.runs import RunReader, notice_line, read_record
from hynb.supervision import processes_of

# Enough that a run is far from its end when its first checkpoint is seen, also on a fast machine.
STEPS, SAVED = 120, 40
SAMPLES = 6


def long_run(files, folder, **values) -> Config:
    """A run of two ranks with several checkpoints."""
    given = {"max_steps": STEPS, "save_steps": SAVED, "learning_rate": 1e-3, "min_lr": None, "bf16": False}
    return config_of(files, "hunyuan_v1_dense", folder, **(given | values))


def test_after_sigterm_to_a_rank_the_losses_are_those_of_an_undisturbed_run(files, ranks, tmp_path):
    expected = losses(ranks.train(long_run(files, tmp_path / "whole")))
    run = launch(long_run(files, tmp_path / "run", max_restarts=2))
    first = read_record(run.dir.launch)["id"]
    wait_until(lambda: run.checkpoints() or not run.status().live, "a checkpoint")
    process_of(run, 1).send_signal(signal.SIGTERM)
    # Every look until the end sees a live run, also between the two starts.
    status = run.wait(timeout_seconds=START_SECONDS)
    assert status.state == "finished", status
    assert read_record(run.dir.launch)["id"] != first
    wait_until(lambda: not processes_of(first), "the end of all processes of the first start")
    assert losses(run) == expected
    (event,) = [event for event in run.events() if event["kind"] == "restart"]
    reason = "stopped by SIGTERM to 1 of 2 ranks after "
    assert event["number"] == 1 and event["checkpoint"].startswith("checkpoint-") and reason in event["reason"]
    (noted,) = run.reader.manifest()["restarts"]
    assert {name: noted[name] for name in ("number", "checkpoint", "reason")} == {
        name: event[name] for name in ("number", "checkpoint", "reason")
    }
    shown = f"restart 1 from {event['checkpoint']}, after step {event['global_step']}: {reason}"
    assert notice_line(event).startswith(shown)


def test_a_run_goes_on_without_a_host_that_is_lost_for_good(files, ranks, tmp_path):
    need(shutil.which("pdsh") is not None, "pdsh is not installed")
    values = {"max_steps": STEPS, "save_steps": SAVED, "learning_rate": 1e-4, "bf16": False, "weight_decay": 0.1}
    # Whole steps in every epoch, which three ranks and two can make.
    values |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": SAMPLES // 3}
    values |= {"deepspeed": "ds_zero2_no_offload"}
    (tmp_path / "given").mkdir()
    shutil.copytree(files["hunyuan_v1_dense"], tmp_path / "given" / "model")
    data = tiny_data(tmp_path / "given" / "train.jsonl", 4 * SAMPLES)
    alone = config_of(files, "hunyuan_v1_dense", tmp_path / "alone", num_processes=3, **values)
    expected = losses(ranks.train(alone.replace(train_data_file=str(data), min_lr=None, warmup_ratio=0.0)))
    with many_hosts(tmp_path / "hosts", 3, shared=True) as hosts:
        job = Job(made_ready(hosts, tmp_path / "given"), "run")
        job.launch(**values, max_restarts=1, min_hosts=2, warmup_ratio=0.0, silence_timeout_seconds=5)
        job.until(lambda: job.dir.checkpoints() or job.dir.exit.exists(), START_SECONDS)
        lost = hosts[2]
        lost.freeze()
        lost.link(up=False)
        job.until(job.dir.exit.exists, END_SECONDS + START_SECONDS)
        status = RunReader(job.dir.path).status()
        assert status.state == "finished", (status, job.dir.launcher_log.read_text()[-3000:])
        assert job.losses() == pytest.approx(expected, abs=1e-4) and len(expected) == STEPS
        (event,) = [item for item in RunReader(job.dir.path).events() if item["kind"] == "restart"]
        assert event["lost_hosts"] == ["host2"] and "host2: this host has been silent" in event["reason"]
        assert RunReader(job.dir.path).manifest()["hosts"] == ["host0", "host1"]
        assert "include: host0@host1" in job.dir.config.read_text()
