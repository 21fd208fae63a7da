"""Runs over two real hosts whose connection, devices, memory or disk fail, and a kill from the other host."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

from conftest import need
from hosts import two_hosts
from jobs import END_SECONDS, Job, made_ready

from hynb.config import to_yaml
from hynb.supervision import CODE


def test_a_connection_that_breaks_for_less_than_the_limit_ends_nothing(apart):
    job = Job(apart, "interrupted")
    job.launch(silence_timeout_seconds=30)
    job.until_trains()
    before = {process.pid for process in job.left()}
    for times in (1, 2):
        apart.beta.link(up=False)
        try:
            # The guard gives its connection up after a third of the limit.
            time.sleep(14)
        finally:
            apart.beta.link(up=True)
        again = "beta: its guard has connected again"
        job.until(lambda times=times, again=again: job.dir.launcher_log.read_text().count(again) >= times, 60)
        job.until_trains(20)
    assert {process.pid for process in job.left()} == before, "no process was ended or replaced"
    stopped = job.cli("stop", job.folder)
    assert "stopped on request after a checkpoint" in stopped.stdout
    job.until_ended(END_SECONDS)
    # What beta's rank wrote while the cable was out is complete here: its log arrived whole.
    (theirs,) = (apart.beta.path(job.folder) / "log").glob("*_rank1.log")
    assert (job.dir.log / theirs.name).read_bytes() == theirs.read_bytes()


def test_without_attempts_to_reconnect_a_broken_connection_ends_the_run_at_once(apart):
    job = Job(apart, "no attempts")
    job.launch(reconnect_attempts=0, silence_timeout_seconds=3600)
    job.until_trains()
    (guard,) = (item for item in job.left("beta") if "hynb.supervision.node_guard" in item.argv)
    os.kill(guard.pid, signal.SIGKILL)
    print(f"a killed guard on another host: {job.until_ended(END_SECONDS):.1f} s")
    status = job.status()
    assert (status["state"], status["host"]) == ("failed", "beta") and "its guard ended" in status["reason"], status


def test_ranks_see_the_devices_that_the_user_chose_on_their_host(together):
    """The launching process's own choice on its host, that of a login on the others; slots are counted among them."""
    alpha, beta = together
    hostfile = alpha.disk / "two_slots"
    alpha.path(hostfile).write_text("alpha slots=2\nbeta slots=2\n")
    for host, visible in ((alpha, "7,8,9"), (beta, "GPU-b,MIG-c")):
        host.stop_sshd()
        host.start_sshd(first=[f"SetEnv CUDA_VISIBLE_DEVICES={visible}"])
    try:
        job = Job(together, "chosen devices")
        file = alpha.disk / "chosen.yaml"
        config = job.config(hostfile=str(hostfile), ssh_config=str(alpha.disk / "cluster" / "ssh_config"))
        config = config.replace(include="alpha:1@beta:1")
        alpha.path(file).write_text(to_yaml(config))
        env = {"PYTHONPATH": str(CODE), "CUDA_VISIBLE_DEVICES": "MIG-a,5"}
        assert devices_when_typed(together, file, env) == ["5", "MIG-c"]
        alpha.run([sys.executable, "-m", "hynb.cli", "launch", "--config", file], env=env)
        job.until_trains()
        # Children of the ranks, by which the ranks' own environment shows.
        guards = {
            host.name: [item for item in job.left(host.name) if "hynb.supervision.node_guard" in item.argv]
            for host in together
        }
        seen = {name: [item.environment["CUDA_VISIBLE_DEVICES"] for item in items] for name, items in guards.items()}
        assert seen == {"alpha": ["5"], "beta": ["MIG-c"]}
        job.cli("stop", job.folder, "--kill")
        alpha.path(hostfile).write_text("alpha slots=2\nbeta slots=8\n")
        alpha.path(file).write_text(to_yaml(config.replace(include=None, output_dir=str(alpha.disk / "too many"))))
        refused = alpha.hynb("launch", "--config", file)
        assert refused.returncode == 2
        assert "beta: slot 7 is to be used, but CUDA_VISIBLE_DEVICES=GPU-b,MIG-c there names 2" in refused.stderr
        assert not alpha.path(alpha.disk / "too many").exists()
    finally:
        for host in together:
            host.stop_sshd()
            host.start_sshd()


def devices_when_typed(hosts, file, env) -> list[str]:
    """What each rank sees where a person types the lines that `hynb check` prints, on their hosts."""
    alpha = hosts.alpha
    checked = alpha.run([sys.executable, "-m", "hynb.cli", "check", "--config", file], env=env)
    *_, on_alpha, line_of_alpha, on_beta, line_of_beta = checked.stdout.splitlines()
    assert (on_alpha, on_beta) == ("# on alpha:", "# on beta:")
    # In the notebook, no host is asked.
    show = f"print(command_text(read_yaml({str(file)!r}).config('')))"
    imports = "from hynb.config import read_yaml; from hynb.supervision import command_text; "
    shown = alpha.run([sys.executable, "-c", imports + show], env=env).stdout.splitlines()
    assert shown[::2] == [
        "# on alpha:",
        "# on beta:",
        "# CUDA_VISIBLE_DEVICES of the other hosts is not known here: the ranks get these devices (beta: 1). "
        "`hynb launch` keeps to the variable on each host",
    ]
    script = alpha.disk / "see.py"
    alpha.path(script).write_text(
        "import os, pathlib\n"
        "place = pathlib.Path(__file__).with_name(f'seen by rank {os.environ[\"RANK\"]}')\n"
        "place.write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
    )
    for host, line in ((hosts.alpha, line_of_alpha), (hosts.beta, line_of_beta)):
        assert " --module " in line and " hynb.train_entry " in line
        host.run(["sh", "-c", line.replace(" --module ", " ").replace("hynb.train_entry", str(script))], env=env)
    return [alpha.path(alpha.disk / f"seen by rank {rank}").read_text() for rank in (0, 1)]


def test_a_host_whose_disk_is_full_is_named(apart):
    """Nothing can be written there any more: no part of the checkpoint, no line of the log, no record."""
    beta, job = apart.beta, Job(apart, "full")
    beta.path(job.folder).mkdir()
    beta.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", job.folder])
    try:
        job.launch()
        job.until_trains()
        fill = f"cat /dev/zero > {job.folder}/filled 2>/dev/null; df --output=avail {job.folder} | tail -n 1"
        assert beta.run(["sh", "-c", fill]).stdout.strip() == "0"
        started = time.monotonic()
        job.cli("stop", job.folder, check=False)
        job.until_ended(END_SECONDS)
        print(f"a full disk, from the request to stop: {time.monotonic() - started:.1f} s")
        assert beta.run(["find", job.folder / "log", "-name", "failure*", "-size", "+0"]).stdout == ""
    finally:
        beta.run(["umount", "-l", job.folder])
    status = job.status()
    assert (status["state"], status["host"], status["rank"]) == ("failed", "beta", 1), status
    assert "rank 1 on beta: " in status["reason"] and "full" in status["reason"], status["reason"]


def test_hosts_without_the_memory_of_a_run_on_gpus_are_named_at_launch(files, tmp_path):
    need(shutil.which("pdsh") is not None, "pdsh is not installed")
    with two_hosts(tmp_path, shared=False, shm="64m") as hosts:
        made_ready(hosts, files)
        config = json.loads((files / "model" / "config.json").read_text())
        big = config | {"hidden_size": 65536, "intermediate_size": 65536, "num_hidden_layers": 100}
        for host in hosts:
            (host.path(host.disk) / "model" / "config.json").write_text(json.dumps(big))
        job = Job(hosts, "too large")
        file = hosts.alpha.disk / "large.yaml"
        hosts.alpha.path(file).write_text(to_yaml(job.config(deepspeed="ds_zero3_offload", use_lora=False)))
        command = [sys.executable, "-m", "hynb.cli", "launch", "--config", file]
        env = {"PYTHONPATH": str(CODE), "CUDA_VISIBLE_DEVICES": "0"}
        refused = hosts.alpha.run(command, env=env, check=False)
        assert refused.returncode == 2, refused.stderr
        for name in ("alpha", "beta"):
            assert re.search(rf"{name}: memory: .* GB are free, and this run takes \d+\.\d GB", refused.stderr)
            assert f"{name}: shared memory: /dev/shm: 67 MB free, 512 MB needed" in refused.stderr
        assert not job.dir.path.exists(), "nothing was begun"


def test_of_two_launches_at_the_same_moment_one_goes_on_and_is_killed_from_the_other_host(together):
    """Through the shared folder a kill reaches the supervisor; where it cannot, it says so and ends nothing."""
    job = Job(together, "launched twice")
    file = together.alpha.disk / "twice.yaml"
    together.alpha.path(file).write_text(to_yaml(job.config(silence_timeout_seconds=120)))
    command = [sys.executable, "-m", "hynb.cli", "launch", "--config", file]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [host.popen(command, env={"PYTHONPATH": str(CODE)}, **streams) for host in together]
    shown = [process.communicate(timeout=END_SECONDS)[0] for process in started]
    assert sorted(process.returncode for process in started) == [0, 2], shown
    (refused,) = (text for text, process in zip(shown, started, strict=True) if process.returncode)
    assert "another launch into it is under way" in refused or "has a live run" in refused, refused
    launching, other = sorted(together, key=lambda host: started[host.name == "beta"].returncode)
    job.until_trains()
    before = {process.pid for process in job.left()}
    process = json.loads(job.dir.launch.read_text())["process"]
    assert process["host"] == launching.name
    launching.run(["kill", "-STOP", process["pid"]])
    code = f"from hynb.launch import attach; attach({str(job.folder)!r}).kill(wait_seconds=3)"
    refused = other.run([sys.executable, "-c", code], env={"PYTHONPATH": str(CODE)}, check=False)
    assert refused.returncode == 1
    says = (
        f"{launching.name} (or in a container with that name), and its supervisor has not answered within 3 seconds"
    )
    assert f"{says}: nothing" in refused.stderr
    assert f"hynb stop --kill {job.folder}" in refused.stderr.replace("'", "")
    launching.run(["kill", "-CONT", process["pid"]])
    job.until_trains(10)
    assert {process.pid for process in job.left()} == before and not job.dir.exit.exists()
    stopped = other.hynb("stop", job.folder, "--kill")
    assert "killed on request" in stopped.stdout, stopped.stderr
    job.until_ended(END_SECONDS)
    assert json.loads(job.dir.exit.read_text())["state"] == "stopped"


def test_without_a_shared_folder_a_kill_ends_nothing_and_a_frozen_rank_of_another_host_is_named(apart):
    job = Job(apart, "frozen rank")
    job.launch()
    job.until_trains()
    refused = apart.beta.hynb("stop", job.folder, "--kill")
    assert refused.returncode == 2 and "launched on alpha" in refused.stderr
    job.until_trains(10)
    os.kill(job.rank(1).pid, signal.SIGSTOP)
    print(f"a frozen rank on another host: {job.until_ended(END_SECONDS):.1f} s")
    status = job.status()
    assert (status["state"], status["host"], status["rank"]) == ("failed", "beta", 1), status
    assert "rank 1 on beta has been stopped by a signal (SIGSTOP)" in status["reason"]
    stacks = job.dir.stacks.read_text()
    assert "rank 0 on alpha\n" in stacks and "rank 1 on beta\nwrote nothing" in stacks and "train_entry.py" in stacks
