"""Runs over two real hosts: trained, stopped and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import uuid
from collections.abc import Callable

import pytest
from conftest import need
from jobs import END_SECONDS, START_SECONDS, Job

from hynb.runs import RunDir
from hynb.supervision import CODE, Membership

STAGES = {"ZeRO-2": "ds_zero2_no_offload", "ZeRO-3": "ds_zero3_no_offload"}
# Enough for a stop in the middle: a step of ZeRO-2 takes 20 ms here, one of ZeRO-3 100 ms.
STEPS = {"ZeRO-2": 200, "ZeRO-3": 60}


@pytest.fixture(scope="module")
def one_host_losses(apart) -> Callable[[str], dict[int, float]]:
    """The losses of a stage on one host with two ranks, which its hostfile names."""
    known: dict[str, dict[int, float]] = {}

    def losses(stage: str) -> dict[int, float]:
        if stage not in known:
            job = Job(apart, f"alone {stage}")
            hostfile = apart.alpha.disk / "one_host"
            apart.alpha.path(hostfile).write_text("alpha slots=2\n")
            job.launch(hostfile=str(hostfile), deepspeed=STAGES[stage], max_steps=STEPS[stage])
            job.until(lambda: job.status().get("state") == "finished", START_SECONDS)
            known[stage] = job.losses()
        return known[stage]

    return losses


@pytest.mark.parametrize(("place", "stage"), [("apart", "ZeRO-2"), ("apart", "ZeRO-3"), ("together", "ZeRO-3")])
def test_losses_equal_those_of_one_host_through_a_stop_and_a_resume(place, stage, request, one_host_losses):
    hosts = request.getfixturevalue(place)
    job, token = Job(hosts, f"run of {stage}"), "t0ken-of-this-test"
    variables = hosts.alpha.path(hosts.alpha.disk / ".deepspeed_env")
    variables.write_text(f"OUR_TOKEN={token}\nNCCL_DEBUG=INFO\n")
    job.launch(deepspeed=STAGES[stage], max_steps=STEPS[stage])
    job.until_trains()
    variables.unlink()
    assert not [process for host in hosts for process in host.processes() if token in " ".join(process.argv)]
    written = (path for path in job.dir.path.rglob("*") if path.is_file())
    holding = {path for path in written if token in path.read_text(errors="ignore")}
    assert holding <= set(job.dir.log.glob(".secret-*"))
    stopped = job.cli("stop", job.folder)
    assert "stopped on request after a checkpoint" in stopped.stdout
    job.until_ended(END_SECONDS)
    step = job.status()["global_step"]
    assert 2 <= step < STEPS[stage] and job.status()["state"] == "stopped"
    shared = place == "together"
    says = "one folder, shared by all hosts" if shared else "a folder of its own on each host"
    assert says in job.dir.rank_log(0).read_text()
    for host in hosts:
        checkpoint = host.path(job.folder) / f"checkpoint-{step}"
        parts = sorted(path.name for path in checkpoint.glob("global_step*/*optim_states.pt"))
        assert len(parts) == (2 if shared else 1), f"{host.name}: {parts}"
        assert stat.S_IMODE(host.path(job.folder).stat().st_mode) == 0o700
        for name in ("model.safetensors", "trainer_state.json", "hynb_checkpoint.json", "tokenizer.json"):
            assert (checkpoint / name).is_file(), f"{host.name}: {name}"
    resumed = {"max_steps": STEPS[stage], "resume_from_checkpoint": "last", "allow_changed": "max_steps"}
    followed = job.launch("--follow", deepspeed=STAGES[stage], **resumed)
    assert f"starting: all hosts have joined; output_dir is {says}" in followed.stdout
    assert "waiting for" in followed.stdout and f"step {STEPS[stage]}/{STEPS[stage]}" in followed.stdout
    job.until_ended(END_SECONDS)
    assert job.status()["state"] == "finished", job.status()
    assert job.losses() == pytest.approx(one_host_losses(stage), abs=1e-5)
    assert list(job.losses()) == list(range(1, STEPS[stage] + 1))
    manifest = json.loads(job.dir.manifest.read_text())
    assert manifest["hosts"] == ["alpha", "beta"] and manifest["output_dir_shared"] is shared
    assert len(job.dir.rank_logs()) == 2 and "train_loss" in job.dir.rank_logs()[1].read_text()
    assert not list(job.dir.log.glob(".secret-*")), "no secret stays behind"
    if not shared:
        beside = hosts.beta.hynb("status", job.folder)
        assert beside.returncode == 2 and "launched on alpha" in beside.stderr


def test_a_host_that_only_launches(together):
    job = Job(together, "launched from outside")
    followed = job.launch("--follow", include="beta", max_steps=3)
    assert "finished, step 3 of 3" in followed.stdout
    manifest = json.loads(job.dir.manifest.read_text())
    assert manifest["hosts"] == ["beta"] and manifest["world_size"] == 1
    job.until_ended(END_SECONDS)


def test_a_host_that_a_scheduler_takes_away_ends_the_run_with_a_checkpoint(together):
    job = Job(together, "taken away")
    job.launch()
    job.until_trains()
    ended = job.left("beta")
    assert any("node_guard" in " ".join(process.argv) for process in ended) and len(ended) >= 3
    for process in ended:
        os.kill(process.pid, signal.SIGTERM)
    job.until_ended(END_SECONDS)
    status = job.status()
    step = status["global_step"]
    assert status["state"] == "stopped", status
    assert status["reason"] == f"stopped by SIGTERM to 1 of 2 ranks after a checkpoint: checkpoint-{step}"
    assert [path.name for path in job.dir.checkpoints()] == [f"checkpoint-{step}"]


def test_open_mpi_starts_the_ranks(together):
    need(shutil.which("ompi_info") is not None, "Open MPI is not installed")
    job = Job(together, "mpi")
    job.launch(launcher="openmpi")
    job.until_trains()
    assert len(job.dir.rank_logs()) == 2
    os.kill(job.rank(1).pid, signal.SIGKILL)
    job.until_ended(END_SECONDS)
    status = job.status()
    assert (status["state"], status["host"], status["rank"]) == ("failed", "beta", 1), status


def test_a_host_that_cannot_reach_the_supervisor_says_so(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    membership = Membership(
        launch_id=uuid.uuid4().hex,
        run_folder=tmp_path / "run",
        supervisor_host="alpha",
        address="127.0.0.1",
        port=port,
        hosts=(("beta", 1),),
        secret="known to nobody",
        start_seconds=1,
        silence_seconds=10,
    )
    code = "from hynb.supervision import Membership, join; join(Membership.from_environment(), 0)"
    environment = os.environ | membership.variables(secret_file=None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60)
    assert done.returncode == 1
    log = RunDir(membership.run_folder).rank_log(0).read_text()
    assert f"beta: cannot reach the launching host alpha at 127.0.0.1:{port}: Connection refused" in log


def test_names_that_a_shell_would_run_are_names(apart):
    """pdsh hands the command to a shell on each host; DeepSpeed quotes neither paths nor variables for it."""
    name = """odd $(touch pwned) `touch pwned` 50% %n 'single' "double" ; touch pwned &"""
    job = Job(apart, name)
    followed = job.launch("--follow", max_steps=3)
    assert "finished, step 3 of 3" in followed.stdout, followed.stdout
    job.until_ended(END_SECONDS)
    for host in apart:
        assert (host.path(job.folder) / "checkpoint-3" / "model.safetensors").is_file(), host.name
        found = host.run(["find", "/root", str(host.disk), str(CODE), "-name", "pwned", "-not", "-path", "*/.venv/*"])
        assert found.stdout == "", found.stdout
    assert len(job.dir.rank_logs()) == 2
