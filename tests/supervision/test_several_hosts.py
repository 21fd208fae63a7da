"""Runs over two real hosts: trained, stopped, resumed, killed, and ended on both hosts whatever fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

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


@pytest.fixture(scope="module")
def start_timeout(apart) -> int:
    """A limit that hosts keep on this machine, however busy it is now, and that is as short as can be."""
    job = Job(apart, "measured")
    started = time.monotonic()
    job.launch(start_timeout_seconds=int(START_SECONDS))
    job.until(lambda: len(list(job.dir.log.glob("*_rank0.log"))) and "hosts:" in job.dir.rank_log(0).read_text(), 300)
    seconds = time.monotonic() - started
    job.cli("stop", job.folder, "--kill")
    return round(3 * seconds) + 3


@pytest.mark.parametrize(("place", "stage"), [("apart", "ZeRO-2"), ("apart", "ZeRO-3"), ("together", "ZeRO-3")])
def test_losses_equal_those_of_one_host_through_a_stop_and_a_resume(place, stage, request, one_host_losses):
    hosts = request.getfixturevalue(place)
    job = Job(hosts, f"run of {stage}")
    job.launch(deepspeed=STAGES[stage], max_steps=STEPS[stage])
    job.until_trains()
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
        for name in ("model.safetensors", "trainer_state.json", "hynb_checkpoint.json", "tokenizer.json"):
            assert (checkpoint / name).is_file(), f"{host.name}: {name}"
    resumed = {"max_steps": STEPS[stage], "resume_from_checkpoint": "last"}
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


def test_each_failure_ends_the_run_everywhere_and_no_other_job(apart):
    """Killed on request, a rank killed, a host frozen, a cable pulled: one run each, the first two beside another."""
    beside = Job(apart, "beside")
    beside.launch()
    beside.until_trains()
    # Its ranks leave the cores to the others.
    for process in (beside.rank(0), beside.rank(1)):
        os.setpriority(os.PRIO_PROCESS, process.pid, 19)
    theirs = {process.pid for process in beside.left()}

    killed = Job(apart, "killed")
    killed.launch()
    killed.until_trains()
    assert len(killed.left("alpha")) >= 5 and len(killed.left("beta")) >= 3
    started = time.monotonic()
    stopped = killed.cli("stop", killed.folder, "--kill")
    assert not killed.left(), killed.left()
    print(f"killed on request: {time.monotonic() - started:.1f} s")
    assert "killed on request; there is no checkpoint" in stopped.stdout
    assert {process.pid for process in beside.left()} == theirs

    lost = Job(apart, "killed")
    refused = lost.launch(check=False)
    assert refused.returncode == 2 and "holds an earlier run (stopped)" in refused.stderr
    old = apart.beta.path(lost.folder) / "checkpoint-7"
    old.mkdir()
    lost.launch(overwrite_output_dir=True)
    lost.until_trains()
    os.kill(lost.rank(1).pid, signal.SIGKILL)
    took = lost.until_ended(END_SECONDS)
    print(f"a killed rank: {took:.1f} s")
    assert not old.exists(), "overwritten on each host"
    status = lost.status()
    assert (status["state"], status["host"], status["rank"]) == ("failed", "beta", 1), status
    assert "rank 1 on beta was killed" in status["reason"]
    assert "'loss'" in status["reason"] and "'loss'" in lost.dir.rank_log(1).read_text(), "its last lines are kept"
    shown = lost.cli("status", lost.folder, check=False)
    assert shown.returncode == 1 and "rank 1 on beta" in shown.stdout
    assert {process.pid for process in beside.left()} == theirs

    apart.beta.freeze()
    took = beside.until(lambda: beside.dir.exit.exists() and not beside.left("alpha"), END_SECONDS)
    print(f"a frozen host: {took:.1f} s")
    apart.beta.thaw()
    beside.until(lambda: not beside.left(), END_SECONDS)
    status = beside.status()
    assert (status["state"], status["host"]) == ("failed", "beta") and "frozen or down" in status["reason"], status
    assert "'loss'" in status["reason"]

    cut = Job(apart, "cut")
    cut.launch()
    cut.until_trains()
    apart.beta.link(up=False)
    try:
        # The host that is cut off ends its own processes.
        took = cut.until_ended(END_SECONDS)
    finally:
        apart.beta.link(up=True)
    print(f"a cut cable: {took:.1f} s")
    status = cut.status()
    assert (status["state"], status["host"]) == ("failed", "beta") and "the network to it is cut" in status["reason"]
    assert not list(Path("/tmp").glob(f"hynb-{cut.launch_id()}-*"))


def test_hosts_that_cannot_take_part_are_named(apart, start_timeout):
    alpha, beta = apart
    job = Job(apart, "refused")
    (alpha.path(alpha.disk) / "train.jsonl").rename(alpha.path(alpha.disk) / "elsewhere.jsonl")
    refused = job.launch(check=False)
    (alpha.path(alpha.disk) / "elsewhere.jsonl").rename(alpha.path(alpha.disk) / "train.jsonl")
    assert refused.returncode == 2 and "there is no such file" in refused.stderr
    beta.stop_sshd()
    refused = job.launch(check=False)
    beta.start_sshd()
    assert refused.returncode == 2 and "beta: nothing listens on port 36005" in refused.stderr
    assert not job.dir.path.exists(), "nothing was begun"
    for values, says in (
        ({"include": "gamma"}, "gamma"),
        ({"launcher": "mpich"}, "install mpich"),
        ({"launcher": "slurm"}, "the program srun is not on this machine"),
        ({"network_interface": "eth7"}, "this machine has no such interface; it has cable, lo"),
        ({"network_interface": "lo"}, "other hosts cannot reach the loopback interface"),
        ({"include": "beta@alpha", "exclude": "beta"}, "include and exclude are both given"),
    ):
        refused = job.launch(check=False, **values)
        assert refused.returncode == 2 and says in refused.stderr and "Traceback" not in refused.stderr, (
            refused.stderr
        )
    (alpha.path(alpha.disk) / ".deepspeed_env").write_text("# ours\nNCCL_DEBUG=INFO\nno sign\n")
    refused = job.launch(check=False)
    assert refused.returncode == 2 and ".deepspeed_env:3: 'no sign' is not NAME=VALUE" in refused.stderr
    (alpha.path(alpha.disk) / ".deepspeed_env").unlink()

    # Only beta has no model; only beta's rank can find out.
    job = Job(apart, "lacking")
    (beta.path(beta.disk) / "model").rename(beta.path(beta.disk) / "gone")
    job.launch()
    job.until_ended(END_SECONDS)
    (beta.path(beta.disk) / "gone").rename(beta.path(beta.disk) / "model")
    status = job.status()
    assert (status["state"], status["host"], status["rank"]) == ("failed", "beta", 1), status
    assert "there is no such folder" in status["reason"]

    # Files of somebody else, or a run of beta's own, in the folder that beta has at the same path.
    job = Job(apart, "occupied")
    theirs = beta.path(job.folder)
    (theirs / "checkpoint-7").mkdir(parents=True)
    for overwrite in (False, True):
        job.launch(overwrite_output_dir=overwrite)
        job.until_ended(END_SECONDS)
        status = job.status()
        assert (status["state"], status["host"]) == ("failed", "beta"), status
        assert "beta: output_dir = " in status["reason"]
        assert "holds no run, but checkpoint-7, which a run would replace: choose another folder" in status["reason"]
    assert (theirs / "checkpoint-7").is_dir() and not (theirs / "led_from").exists()
    (theirs / "status.json").write_text('{"state": "finished"}')
    shutil.rmtree(job.dir.path)
    job.launch()
    job.until_ended(END_SECONDS)
    assert "holds an earlier run (finished). Resume it with" in job.status()["reason"]

    # Alpha only launches, and does not see what beta writes.
    job = Job(apart, "elsewhere")
    job.launch(include="beta")
    job.until_ended(END_SECONDS)
    assert "launch on beta, or put output_dir on a shared disk" in job.status()["reason"]

    job = Job(apart, "absent")
    job.launch(start_timeout_seconds=start_timeout)
    beta.freeze()
    job.until(lambda: job.dir.exit.exists() and not job.left("alpha"), END_SECONDS)
    beta.thaw()
    status = job.status()
    assert (status["state"], status["host"]) == ("failed", "beta"), status
    # Either limit may be the shorter one: that of the start, or ssh's own.
    assert "did not join" in status["reason"]
    assert "beta: no answer within 8 s" in status["reason"]
    job.until(lambda: not job.left(), END_SECONDS)


def test_ranks_that_do_not_connect_end_the_run(apart, start_timeout):
    job = Job(apart, "not met")
    job.launch(start_timeout_seconds=start_timeout, silence_timeout_seconds=600)
    notes = Path(tempfile.gettempdir()) / f"hynb-{job.launch_id()}-1"
    job.until((notes / "rank1.meeting").exists, START_SECONDS)
    # As if its packets to the master port were dropped.
    os.kill(job.rank(1).pid, signal.SIGSTOP)
    job.until_ended(END_SECONDS)
    status = job.status()
    assert (status["state"], status["host"], status["rank"]) == ("failed", "beta", 1), status
    assert f"did not connect to each other within start_timeout_seconds = {start_timeout}" in status["reason"]
    assert not notes.exists()


def test_lines_pasted_by_hand(together, start_timeout):
    """launcher no_ssh, with the user's own .deepspeed_env, and without ssh between the hosts."""
    alpha, beta = together
    job = Job(together, "pasted")
    beta.stop_sshd()
    (alpha.path(alpha.disk) / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n")
    shown = job.launch(launcher="no_ssh", max_steps=300)
    assert "waiting for" in job.cli("status", job.folder).stdout
    assert "beta" in job.cli("status", job.folder).stdout
    comment, line, copy = shown.stdout.splitlines()[-3:]
    assert comment == "# on beta:" and job.dir.paste.stat().st_mode & 0o77 == 0
    secret = job.dir.secret(job.launch_id())
    assert secret.read_text() not in shown.stdout, "the secret is shown to nobody"
    assert str(job.folder / "log" / secret.name) in copy and secret.stat().st_mode & 0o77 == 0
    pasted = beta.popen(
        ["bash", "-c", f"export CUDA_VISIBLE_DEVICES=GPU-b; {line}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    job.until(lambda: job.losses() or job.dir.exit.exists(), START_SECONDS)
    (guard,) = (item for item in job.left("beta") if "hynb.supervision.node_guard" in item.argv)
    assert guard.environment["CUDA_VISIBLE_DEVICES"] == "GPU-b", "those of the shell where it was pasted"
    out, _ = pasted.communicate(timeout=START_SECONDS)
    assert pasted.returncode == 0 and b"NCCL_DEBUG=INFO" in out, out
    job.until_ended(END_SECONDS)
    assert job.status()["state"] == "finished" and len(job.losses()) == 300
    assert not job.dir.paste.exists()
    beta.start_sshd()
    # Nobody pastes the line.
    job = Job(together, "not pasted")
    job.launch(launcher="no_ssh", start_timeout_seconds=start_timeout)
    job.until_ended(END_SECONDS)
    assert job.status()["host"] == "beta" and "was its line pasted there" in job.status()["reason"]


def test_a_host_that_only_launches(together):
    job = Job(together, "launched from outside")
    followed = job.launch("--follow", include="beta", max_steps=3)
    assert "finished, step 3 of 3" in followed.stdout
    manifest = json.loads(job.dir.manifest.read_text())
    assert manifest["hosts"] == ["beta"] and manifest["world_size"] == 1
    job.until_ended(END_SECONDS)


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
