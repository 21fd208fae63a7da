"""A rank of a launched run ends by a signal: the run names it, ends in seconds, and goes on from its checkpoint."""

from __future__ import annotations

import shlex
import signal
import socket
import time

from training_runs import config_of, process_of
from waiting import wait_until

from hynb.cli import main
from hynb.launch import launch
from hynb.runs import read_record
from hynb.supervision import processes_of

HOST = socket.gethostname()


def test_the_rank_its_signal_and_the_command_to_go_on_are_named(files, tmp_path, record_property):
    values = {"max_steps": 100_000, "save_steps": 2, "save_total_limit": 1, "learning_rate": 1e-5, "min_lr": None}
    run = launch(config_of(files, "hunyuan_v1_dense", tmp_path / "run", **values))
    wait_until(lambda: run.checkpoints() or not run.status().live, "a checkpoint")
    process_of(run, 1).send_signal(signal.SIGSEGV)
    started = time.monotonic()
    status = run.wait(timeout_seconds=300)
    record_property("seconds", round(time.monotonic() - started, 1))
    print(f"SIGSEGV: {time.monotonic() - started:.1f} s")
    assert (status.state, status.host, status.rank) == ("failed", HOST, 1), status
    assert status.reason.startswith(f"rank 1 on {HOST} crashed (SIGSEGV): an error in native code")
    (kept,) = run.checkpoints()[-1:]
    command = status.reason.splitlines()[-1].partition(": ")[2]
    assert status.reason.splitlines()[-1].startswith(f"To go on from {kept.name}: hynb launch --config ")
    step = int(kept.name.rpartition("-")[2])
    words = shlex.split(command)[1:]
    changed = ["--set", f"max_steps={step + 2}", "--set", "allow_changed=max_steps"]
    wait_until(lambda: not processes_of(read_record(run.dir.launch)["id"]), "the end of all processes")
    assert main([*words, *changed, "--follow"]) == 0
    assert run.status().global_step == step + 2
