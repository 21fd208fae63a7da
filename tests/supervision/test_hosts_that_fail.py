"""Runs over two real hosts that fail or are refused, and end on both hosts whatever happens."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from jobs import END_SECONDS, START_SECONDS, Job


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
    assert refused.returncode == 2 and ".deepspeed_env:3: is not NAME=VALUE" in refused.stderr
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
