"""Runs on this machine alone, through the same plan, supervisor and guard as over hosts: killed, frozen, broken."""

from __future__ import annotations

import base64
import fcntl
import functools
import json
import os
import re
import resource
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

import psutil
import pytest
from nccl_messages import waited

from hynb.cluster import Host, host_facts
from hynb.config import Config
from hynb.errors import ClusterError, RunFailedError
from hynb.launch import Run, launch
from hynb.runs import ProcessId, RunDir
from hynb.supervision import LAUNCH_VARIABLE, Membership, command_text, make_plan, processes_of
from hynb.supervision.commands import launch_command
from hynb.supervision.needs import memory_problems

HOST = socket.gethostname()


def config_of(files: Path, folder: Path, **values) -> Config:
    given = {
        "model_name_or_path": str(files / "model"),
        "train_data_file": str(files / "train.jsonl"),
        "output_dir": str(folder),
        "num_processes": 2,
        "max_steps": 1_000_000,
        "save_steps": 100_000,
        "max_seq_length": 256,
    }
    return Config(**(given | values))


def until(condition: Callable[[], object], run: Run, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{run.status()}\n{run.reader.log_tail()}"
        time.sleep(0.05)


def until_trains(*runs: Run) -> None:
    for run in runs:
        until(lambda run=run: run.status().global_step >= 1 or not run.status().live, run)
        assert run.status().state == "running", f"{run.status()}\n{run.reader.log_tail()}"


def launch_record(run: Run) -> dict:
    return json.loads(run.dir.launch.read_text())


def processes(run: Run, *words: str) -> list[psutil.Process]:
    """Processes of a run whose command line has all of these words."""
    return [item for item in processes_of(launch_record(run)["id"]) if all(word in item.cmdline() for word in words)]


def nothing_left(run: Run) -> bool:
    record = launch_record(run)
    registries = list(Path("/tmp").glob(f"hynb-{record['id']}-*"))
    return not processes(run) and not psutil.pid_exists(record["process"]["pid"]) and not registries


def test_a_run_that_a_containers_memory_cannot_hold_is_refused_without_gpus_too(files, tmp_path, monkeypatch):
    """Two ranks take 0.4 GB each, and the model's weights, gradients and optimizer in float32."""
    config, host = config_of(files, tmp_path / "run"), Host(name=HOST, slots=2)
    assert memory_problems(config, [host], 0, None) == []
    group = tmp_path / "sys/fs/cgroup"
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    (tmp_path / "proc/self/mountinfo").write_text("30 24 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n")
    (group / "job").mkdir(parents=True)
    (group / "job/memory.max").write_text("500000000\n")
    (group / "job/memory.current").write_text("100000000\n")
    monkeypatch.setattr(host_facts, "container_limit", functools.partial(host_facts.container_limit, root=tmp_path))
    with pytest.raises(ClusterError) as caught:
        launch(config)
    message = str(caught.value)
    assert f"0.4 of the 0.5 GB that the container's limit ({group}/job/memory.max) allows are free" in message
    assert "and this run takes 0.8 GB of this host by its plan" in message and "use_lora" in message
    assert not (tmp_path / "run" / "launch.json").exists()
    # One rank fits below the limit, if other programs end.
    assert memory_problems(config.replace(num_processes=1), [Host(name=HOST, slots=1)], 0, None) == []


def test_kill_ends_one_run_and_a_killed_rank_is_named(files, tmp_path, monkeypatch):
    secret = "s3cret-of-this-test"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "NCCL_PASSWORD", "DATABASE_URL", "HF_ACCESSTOKEN", "DS_SECRETKEYS"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("NCCL_DEBUG_SUBSYS", "INIT")
    first, second = (launch(config_of(files, tmp_path / name)) for name in ("first", "second"))
    until_trains(first, second)
    assert len(processes(first)) >= 4, "launcher, guard and two ranks"
    for process in processes(first):
        environment = process.environ()
        assert secret not in " ".join([*process.cmdline(), *environment.values()]), process
        assert environment["NCCL_DEBUG_SUBSYS"] == "INIT"
    written = [path for path in first.dir.path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert written == []
    status = first.kill()
    assert status.state == "stopped" and "killed on request; there is no checkpoint" in status.reason
    until(lambda: nothing_left(first), first)
    assert second.status().state == "running", "another run is not touched"
    (rank,) = processes(second, "--local_rank=1")
    rank.send_signal(signal.SIGKILL)
    with pytest.raises(RunFailedError, match=f"rank 1 on {HOST} was killed"):
        second.wait(timeout_seconds=60, check=True)
    status = second.status()
    assert (status.state, status.host, status.rank) == ("failed", HOST, 1)
    assert "The end of its log:\nLoading weights: 100%" in status.reason
    until(lambda: nothing_left(second), second, 30)


def test_a_pause_of_all_processes_ends_nothing_and_a_frozen_rank_ends_the_run(files, tmp_path):
    run = launch(config_of(files, tmp_path / "run", silence_timeout_seconds=3))
    until_trains(run)
    # As a container is paused and goes on: nobody was silent, for nobody could listen.
    supervisor = psutil.Process(launch_record(run)["process"]["pid"])
    paused = {supervisor, *processes(run)}
    for process in paused:
        process.send_signal(signal.SIGSTOP)
    time.sleep(6)
    for process in paused:
        process.send_signal(signal.SIGCONT)
    step = run.status().global_step
    until(lambda: run.status().global_step > step + 5, run)
    (rank,) = processes(run, "--local_rank=1")
    rank.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    status = run.wait(timeout_seconds=60)
    print(f"a frozen rank, with silence_timeout_seconds = 3: {time.monotonic() - started:.1f} s")
    assert (status.state, status.host, status.rank) == ("failed", HOST, 1)
    assert "has been stopped by a signal (SIGSTOP) for" in status.reason
    until(lambda: nothing_left(run), run, 30)


def test_a_rank_that_is_late_under_gloo_is_named_with_the_place_where_it_hangs(files, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys, time\n"
        "def hangs(*_):\n"
        "    time.sleep(3600)\n"
        "if os.environ.get('RANK') == '1' and 'hynb.train_entry' in sys.orig_argv:\n"
        "    signal.signal(signal.SIGUSR2, hangs)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    run = launch(config_of(files, tmp_path / "run", silence_timeout_seconds=3600, collective_timeout_minutes=1))
    until_trains(run)
    (rank,) = processes(run, "--local_rank=1")
    rank.send_signal(signal.SIGUSR2)
    started = time.monotonic()
    status = run.wait(timeout_seconds=120)
    print(f"a hang, with collective_timeout_minutes = 1: {time.monotonic() - started:.1f} s")
    assert (status.state, status.host, status.rank) == ("failed", HOST, 1), status
    assert status.reason.startswith(f"rank 1 on {HOST} did not come in time (collective_timeout_minutes) to where")
    end = json.loads(run.dir.exit.read_text())
    assert (end["host"], end["rank"]) == (HOST, 1)
    assert f"\nrank 1 was in hangs ({tmp_path}/sitecustomize.py:3) < " in status.reason
    assert f"The Python stacks of all ranks: {run.dir.stacks}" in status.reason
    stacks = run.dir.stacks.read_text()
    assert f"rank 0 on {HOST}\n" in stacks and f"rank 1 on {HOST}\n" in stacks and stacks.count("train_entry.py") >= 2


def test_a_rank_that_nccls_watchdog_aborts_is_not_the_cause_but_the_one_that_was_late(files, tmp_path, monkeypatch):
    """Rank 1 prints what NCCL's watchdog prints, and dies as a rank on a GPU would: in a thread, by SIGABRT."""
    (tmp_path / "messages").write_text(waited(1, 78, "BROADCAST"))
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, resource, sys, threading, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "def watchdog():\n"
        "    while not (folder / 'due').exists():\n"
        "        time.sleep(0.05)\n"
        "    os.write(2, (folder / 'messages').read_bytes())\n"
        "    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "    os.abort()\n"
        "if os.environ.get('RANK') == '1' and 'hynb.train_entry' in sys.orig_argv:\n"
        "    threading.Thread(target=watchdog, daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    run = launch(config_of(files, tmp_path / "run"))
    until_trains(run)
    (tmp_path / "due").touch()
    status = run.wait(timeout_seconds=60)
    assert (status.state, status.host, status.rank) == ("failed", HOST, 0), status
    assert status.reason.startswith(
        f"rank 0 on {HOST} did not come in time (collective_timeout_minutes) to where the other ranks waited, "
        "training at step "
    )
    assert ": NCCL's watchdog gave up BROADCAST (number 78) after 600 seconds\nThe end of its log:" in status.reason
    until(lambda: nothing_left(run), run, 30)


def test_a_rank_that_cannot_write_its_part_of_a_checkpoint_is_named(files, tmp_path):
    run = launch(config_of(files, tmp_path / "run"))
    until_trains(run)
    (rank,) = processes(run, "--local_rank=1")
    # As if the disk were full for this rank alone, also for its output.
    resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (60_000, 60_000))
    status = run.stop(timeout_seconds=120)
    assert (status.state, status.host, status.rank) == ("failed", HOST, 1), status
    assert f"rank 1 on {HOST}: {HOST}: torch cannot write a file of the checkpoint" in status.reason
    record = json.loads(run.dir.failure(1).read_text())
    assert (record["rank"], record["host"], record["lost_connection"]) == (1, HOST, False)
    until(lambda: nothing_left(run), run, 30)
    assert not run.checkpoints()


def test_a_killed_supervisor_ends_the_run(files, tmp_path):
    run = launch(config_of(files, tmp_path / "run"))
    until_trains(run)
    os.kill(launch_record(run)["process"]["pid"], signal.SIGKILL)
    started = time.monotonic()
    status = run.wait(timeout_seconds=60)
    assert status.state == "failed" and "its processes are gone" in status.reason
    until(lambda: nothing_left(run), run, 30)
    print(f"a killed supervisor: {time.monotonic() - started:.1f} s")


def test_a_rank_that_ends_before_it_starts_is_named_with_its_log(files, tmp_path, monkeypatch):
    # Every Python process imports this; it breaks rank 1 alone, once the host's guard is there.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, tempfile, time\n"
        "if os.environ.get('RANK') == '1':\n"
        "    ready = pathlib.Path(tempfile.gettempdir(), f'hynb-{os.environ[\"HYNB_LAUNCH_ID\"]}-0', 'ready.json')\n"
        "    while not ready.exists():\n"
        "        time.sleep(0.1)\n"
        "    raise SystemExit('libbroken.so: cannot open')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = launch(config_of(files, tmp_path / "run"))
    status = run.wait(timeout_seconds=120)
    assert (status.state, status.host, status.rank) == ("failed", HOST, 1), status
    assert f"rank 1 on {HOST} ended before it had started up" in status.reason
    assert "libbroken.so: cannot open" in status.reason
    until(lambda: nothing_left(run), run, 30)


def test_a_launcher_that_cannot_start_is_reported_with_its_output(files, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'deepspeed.launcher.launch' in sys.orig_argv:\n    raise SystemExit('no such accelerator')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = launch(config_of(files, tmp_path / "run"))
    status = run.wait(timeout_seconds=60)
    assert status.state == "failed" and "no such accelerator" in status.reason
    assert f"the launcher ended with exit code 1 before {HOST} joined" in status.reason
    until(lambda: nothing_left(run), run, 30)


def test_stop_before_the_ranks_have_joined(files, tmp_path):
    run = launch(config_of(files, tmp_path / "run"))
    status = run.stop(timeout_seconds=60)
    assert (status.state, status.reason) == ("stopped", "stopped on request before all hosts had joined")
    until(lambda: nothing_left(run), run, 30)


def test_names_that_a_shell_would_run_are_names(files, tmp_path):
    folder = tmp_path / """odd $(touch pwned) `touch pwned` 50% 'single' "double" ; touch pwned &"""
    run = launch(config_of(files, folder, max_steps=2, num_processes=1))
    assert run.wait(timeout_seconds=120, check=True).state == "finished"
    assert [path.name for path in run.checkpoints()] == ["checkpoint-2"]
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()


@pytest.mark.parametrize(
    ("visible", "requested", "devices"),
    [
        ("4,5", None, ["4", "5"]),
        ("GPU-1a,MIG-2b,7", 2, ["GPU-1a", "MIG-2b"]),
        (" 3 ", None, ["3"]),
        (None, 2, [0, 1]),
    ],
)
def test_ranks_get_the_devices_that_the_user_chose(files, tmp_path, monkeypatch, visible, requested, devices):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    plan = make_plan(config_of(files, tmp_path / "run", num_processes=requested))
    command = launch_command(plan, RunDir(tmp_path / "run"))
    world = next(word.removeprefix("--world_info=") for word in command if word.startswith("--world_info="))
    assert json.loads(base64.urlsafe_b64decode(world)) == {HOST: devices}


@pytest.mark.parametrize(
    ("visible", "words", "world"),
    [
        ("4,5", "--include localhost:4,5 ", None),
        ("GPU-1a,MIG-2b", "deepspeed.launcher.launch ", ["GPU-1a", "MIG-2b"]),
        (None, "--num_gpus 2 ", None),
    ],
)
def test_the_command_to_type_chooses_the_users_devices(files, tmp_path, monkeypatch, visible, words, world):
    """--num_gpus deletes CUDA_VISIBLE_DEVICES, and --include takes indices alone."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    text = command_text(config_of(files, tmp_path / "run"))
    assert words in text and ("--num_gpus" in text) == (visible is None)
    found = re.search(r"--world_info=(\S+)", text)
    assert (found is not None) == (world is not None)
    if found is not None:
        assert json.loads(base64.urlsafe_b64decode(found[1])) == {HOST: world}


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="on a GPU an optimizer in host memory is compiled")
def test_ranks_on_the_cpu_need_no_compiler(files, tmp_path, monkeypatch):
    programs = tmp_path / "programs"
    programs.mkdir()
    for folder in map(Path, os.environ["PATH"].split(os.pathsep)):
        for program in folder.iterdir() if folder.is_dir() else ():
            if "++" not in program.name and not (programs / program.name).exists():
                (programs / program.name).symlink_to(program)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert shutil.which("c++") is None
    run = launch(config_of(files, tmp_path / "run", deepspeed="ds_zero3_offload", max_steps=1))
    status = run.wait(timeout_seconds=240)
    assert status.state == "finished", status


def test_too_many_ranks_for_the_chosen_devices_are_refused(files, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    with pytest.raises(ClusterError, match="num_processes = 2: CUDA_VISIBLE_DEVICES=4 shows 1 GPU; set it to 1"):
        make_plan(config_of(files, tmp_path / "run", num_processes=2))


def test_more_slots_than_chosen_devices_are_refused(files, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(f"{HOST} slots=8\n")
    with pytest.raises(ClusterError, match=f"{HOST}: slot 7 .*CUDA_VISIBLE_DEVICES=4,5 .*slots=2"):
        launch(config_of(files, tmp_path / "run", hostfile=str(hostfile), num_processes=None))


@pytest.mark.parametrize(("hidden", "seen"), [("", ""), ("-1", "")])
def test_hidden_gpus_stay_hidden_from_the_ranks(files, tmp_path, monkeypatch, hidden, seen):
    """DeepSpeed's launcher sets the variable to its slots, also for the CPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    run = launch(config_of(files, tmp_path / "run", num_processes=1))
    until(lambda: processes(run, "hynb.supervision.node_guard") or not run.status().live, run)
    # The guard is a rank's child.
    (guard,) = processes(run, "hynb.supervision.node_guard")
    assert guard.environ()["CUDA_VISIBLE_DEVICES"] == seen
    run.kill()


def test_deepspeeds_launcher_gives_the_ranks_these_devices(files, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1a,MIG-2b")
    command = launch_command(make_plan(config_of(files, tmp_path / "run")), RunDir(tmp_path / "run"))
    script = tmp_path / "show.py"
    script.write_text(
        "import os, pathlib\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "(folder / os.environ['RANK']).write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
    )
    words = [word for word in command if word != "--module" and not word.startswith("--enable_each_rank_log")]
    subprocess.run([*words[:-1], script], capture_output=True, timeout=120, check=True)
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["GPU-1a,MIG-2b"] * 2


@pytest.mark.parametrize("made", ["open to others", "a link", "somebody else's"])
def test_a_registry_that_somebody_else_made_is_refused(made, tmp_path):
    membership = Membership(
        launch_id=uuid.uuid4().hex,
        run_folder=tmp_path,
        supervisor_host=HOST,
        address="127.0.0.1",
        port=1,
        hosts=((HOST, 1),),
        secret="",
        start_seconds=1,
        silence_seconds=1,
    )
    folder = membership.registry(0)
    try:
        if made == "a link":
            folder.symlink_to(tmp_path)
        else:
            folder.mkdir(mode=0o700)
            if made == "open to others":
                folder.chmod(0o750)
            elif os.geteuid() == 0:
                os.chown(folder, 65534, 65534)
            else:
                pytest.skip("only root can give a folder to somebody else")
        with pytest.raises(ClusterError, match="is not a folder that this user alone can read"):
            membership.make_registry(0)
    finally:
        folder.unlink() if folder.is_symlink() else folder.rmdir()
    assert membership.make_registry(0).stat().st_mode & 0o777 == 0o700
    assert membership.make_registry(0) == folder, "the ranks of one host share it"
    folder.rmdir()


def test_registries_of_killed_guards_are_removed_at_the_next_start_and_no_others(files, tmp_path, monkeypatch):
    # Short, as a socket's path must be.
    temporary = Path(tempfile.mkdtemp(prefix="t"))
    monkeypatch.setenv("TMPDIR", str(temporary))
    ours, gone = ProcessId.of(os.getpid()).record(), {"host": HOST, "pid": os.getpid(), "create_time": 1.0}
    marked = uuid.uuid4().hex
    carries_id = subprocess.Popen(["sleep", "600"], env={**os.environ, LAUNCH_VARIABLE: marked})

    def registry(record: dict | None = None, launch_id: str = "", mode: int = 0o700) -> Path:
        folder = temporary / f"hynb-{launch_id or uuid.uuid4().hex}-0"
        folder.mkdir()
        (folder / "guard").touch()
        (folder / "guard.log").touch()
        if record is not None:
            (folder / "rank0.json").write_text(json.dumps(record | {"log": "x"}))
        folder.chmod(mode)
        return folder

    abandoned = [registry(gone), registry(gone), registry()]
    kept = {
        "a living rank": registry(ours),
        "a rank of another host": registry(gone | {"host": "elsewhere"}),
        "a process that carries the id": registry(gone, marked),
        "open to others": registry(gone, mode=0o755),
        "a damaged note": registry({"pid": "x"}),
        "a guard in another container": registry(gone),
        "another name": temporary / "hynb-notes-0",
        "a link": temporary / f"hynb-{uuid.uuid4().hex}-0",
    }
    kept["another name"].mkdir(mode=0o700)
    kept["a link"].symlink_to(registry(gone).rename(tmp_path / "linked"))
    if os.geteuid() == 0:
        kept["somebody else's"] = registry(gone)
        os.chown(kept["somebody else's"], 65534, 65534)
    for folder in (*abandoned, *kept.values()):
        os.utime(folder, (1, 1), follow_symlinks=False)
    kept["just made"] = registry()
    # As a rank in another container does, before its guard holds the registry.
    kept["just registered"] = registry(gone)
    try:
        with (kept["a guard in another container"] / "guard").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            run = launch(config_of(files, tmp_path / "run", num_processes=1, max_steps=1))
            assert run.wait(timeout_seconds=180, check=True).state == "finished"
            until(lambda: not processes(run), run)
        assert [path for path in abandoned if path.exists()] == []
        assert [name for name, path in kept.items() if not path.exists()] == []
        assert (tmp_path / "linked" / "rank0.json").exists()
        assert not (temporary / f"hynb-{launch_record(run)['id']}-0").exists(), "the run's own"
    finally:
        carries_id.kill()
        carries_id.wait()
        shutil.rmtree(temporary)


def test_membership_travels_through_the_environment_unchanged(tmp_path, monkeypatch):
    secret_file = tmp_path / "secret"
    membership = Membership(
        launch_id="1" * 32,
        run_folder=tmp_path / "odd $(x) `y` 'z' \"w\" % name",
        supervisor_host="fe80::1%eth0",
        address="10.0.0.1",
        port=4711,
        hosts=(("a", 2), ("b=c", 3)),
        secret="s3cret",
        start_seconds=5,
        silence_seconds=7,
        devices=(("GPU-1", "MIG-2"), None),
    )
    monkeypatch.delenv("OUR_API_KEY", raising=False)
    secret_file.write_text(membership.secret_text({"OUR_API_KEY": "=our key="}))
    for file in (secret_file, None):
        variables = membership.variables(secret_file=file)
        assert ("s3cret" in "".join(variables.values())) == (file is None)
        # Characters that DeepSpeed's runners pass on as they are.
        assert all(re.fullmatch(r"[\w=-]*", value, re.ASCII) for value in variables.values())
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert Membership.from_environment() == membership
        assert os.environ["OUR_API_KEY"] == "=our key="
    assert [list(membership.ranks_of(node)) for node in (0, 1)] == [[0, 1], [2, 3, 4]]
    assert [membership.node_of(rank) for rank in range(5)] == [0, 0, 1, 1, 1]


def test_a_secret_that_cannot_be_read_says_where_it_comes_from(tmp_path):
    code = "from hynb.supervision import Membership; Membership.from_environment()"
    membership = Membership(
        launch_id="2" * 32,
        run_folder=tmp_path,
        supervisor_host="alpha",
        address="127.0.0.1",
        port=1,
        hosts=(("beta", 1),),
        secret="",
        start_seconds=1,
        silence_seconds=1,
    )
    environment = os.environ | membership.variables(secret_file=tmp_path / "absent")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    problem = f"{tmp_path / 'absent'} on {HOST}: cannot be read: No such file or directory. Copy the file there from"
    assert f"{problem} alpha" in done.stderr


@pytest.mark.parametrize(("visible", "hosts"), [("0,1,2", None), (None, "localhost slots=4\n")])
def test_ranks_that_cannot_share_sequences_are_refused(files, tmp_path, monkeypatch, visible, hosts):
    """However their number follows: one per GPU, or what a filter leaves of a hostfile."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    values = {"num_processes": None, "sequence_parallel_size": 2}
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if hosts is not None:
        (tmp_path / "hosts").write_text(hosts)
        values |= {"hostfile": str(tmp_path / "hosts"), "exclude": "localhost:3"}
    with pytest.raises(ClusterError, match="does not divide the run's 3 ranks; set it to 1 or 3, or change"):
        make_plan(config_of(files, tmp_path / "run", **values))
