"""The state of a run: from the records of ranks and supervisor, and from processes here and on other hosts."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import get_args

import psutil
import pytest

from hynb.errors import RunError
from hynb.files import write_json
from hynb.launch import Run
from hynb.runs import ProcessId, RunDir, RunReader, RunStatus, RunWriter, check_output_dir
from hynb.runs.heartbeat import Phase
from hynb.runs.status import STALE_HEARTBEAT_SECONDS

ELSEWHERE = {"host": "elsewhere", "pid": 1, "create_time": 1.0}


def status_of(folder) -> RunStatus:
    return RunReader(folder).status()


def test_a_folder_without_a_run(tmp_path):
    assert status_of(tmp_path / "no").state == "absent"
    status = status_of(tmp_path)
    assert status.state == "absent" and "no run was started" in status.reason
    (tmp_path / "led_from").write_text("alpha\n")
    assert "alpha: look there" in status_of(tmp_path).reason


@pytest.mark.parametrize("phase", get_args(Phase))
def test_the_phase_of_a_live_run_is_shown(tmp_path, phase):
    writer = RunWriter(tmp_path)
    writer.phase(phase)
    status = status_of(tmp_path)
    assert (status.state, status.phase) == ("starting", phase)
    assert str(status) == ("starting" if phase == "starting" else f"starting, {phase}")
    writer.status("running", global_step=3, max_steps=9)
    writer.phase(phase)
    expected = "running, step 3 of 9" if phase == "training" else f"running, step 3 of 9, {phase}"
    assert str(status_of(tmp_path)) == expected
    writer.status("finished", exit_code=0)
    status = status_of(tmp_path)
    assert (status.state, status.phase, status.global_step) == ("finished", None, 3)


def test_a_process_of_this_host_needs_no_heartbeat(tmp_path):
    RunWriter(tmp_path).status("running", max_steps=5)
    assert status_of(tmp_path).state == "running", "this very process is the writer"
    process = ProcessId.of(os.getpid()).record()
    earlier = {"host": process["host"], "pid": os.getpid(), "create_time": psutil.Process().create_time()}
    write_json(tmp_path / "status.json", {"state": "running", "process": earlier})
    assert status_of(tmp_path).state == "running", "a record of an earlier version"
    write_json(tmp_path / "heartbeat", {"phase": "training", "global_step": 3})
    for reused in (process | {"start_ticks": 1}, earlier | {"create_time": 1.0}):
        write_json(tmp_path / "status.json", {"state": "running", "process": reused})
        status = status_of(tmp_path)
        assert status.state == "failed" and status.reason.startswith("its processes are gone"), reused


def set_age(path, seconds):
    modified = time.time() - seconds
    os.utime(path, (modified, modified))


@pytest.mark.parametrize("difference", [{"host": "elsewhere"}, {"boot_id": "another"}, {"pid_namespace": 1}], ids=str)
def test_a_process_of_another_host_or_container_is_as_alive_as_its_heartbeat(tmp_path, difference):
    process = ProcessId.of(os.getpid()).record() | difference
    write_json(tmp_path / "status.json", {"state": "running", "process": process})
    assert status_of(tmp_path).state == "failed", "no heartbeat"
    write_json(tmp_path / "heartbeat", {"phase": "saving", "global_step": 3})
    set_age(tmp_path / "heartbeat", STALE_HEARTBEAT_SECONDS / 2)
    assert str(status_of(tmp_path)) == "running, step 3, saving"
    set_age(tmp_path / "heartbeat", STALE_HEARTBEAT_SECONDS)
    assert status_of(tmp_path).state == "failed"


def test_a_recorded_end_outranks_the_fresh_heartbeat_of_another_host(tmp_path):
    write_json(tmp_path / "launch.json", {"id": "2" * 32, "process": ELSEWHERE})
    write_json(tmp_path / "status.json", {"state": "running", "process": ELSEWHERE})
    write_json(tmp_path / "heartbeat", {"phase": "training", "global_step": 3})
    end = {"state": "stopped", "exit_code": -9, "reason": "killed on request"}
    write_json(tmp_path / "exit.json", end | {"id": "1" * 32})
    assert status_of(tmp_path).state == "running", "the record is of the launch before"
    write_json(tmp_path / "exit.json", end | {"id": "2" * 32})
    status = status_of(tmp_path)
    assert (str(status), status.exit_code) == ("stopped, step 3: killed on request", -9)
    assert check_output_dir(tmp_path, overwrite=True, resuming=False) == []


def test_a_clock_that_differs_from_the_disks_ends_no_run(tmp_path, monkeypatch):
    write_json(tmp_path / "status.json", {"state": "running", "process": ELSEWHERE})
    write_json(tmp_path / "heartbeat", {"phase": "training", "global_step": 3})
    now = time.time()
    for hours in (-1, 1):
        monkeypatch.setattr(time, "time", lambda hours=hours: now + 3600 * hours)
        assert str(status_of(tmp_path)) == "running, step 3"


def test_a_heartbeat_of_an_earlier_version_is_read(tmp_path):
    write_json(tmp_path / "status.json", {"state": "running", "process": ELSEWHERE})
    (tmp_path / "heartbeat").write_text("3\n")
    assert str(status_of(tmp_path)) == "running, step 3"
    os.utime(tmp_path / "heartbeat", (1, 1))
    assert status_of(tmp_path).state == "failed"


def test_a_launch_of_another_host_is_alive_until_its_rank_0_should_have_begun(tmp_path):
    limit = 600 + STALE_HEARTBEAT_SECONDS
    launch = {"id": "1" * 32, "process": ELSEWHERE, "membership": {"start_seconds": 600}}
    write_json(tmp_path / "launch.json", launch)
    set_age(tmp_path / "launch.json", limit / 2)
    assert status_of(tmp_path).state == "starting"
    set_age(tmp_path / "launch.json", limit)
    assert status_of(tmp_path).state == "failed"
    set_age(tmp_path / "launch.json", 0)
    write_json(tmp_path / "exit.json", {"state": "stopped", "exit_code": 0, "reason": "stopped on request"})
    assert str(status_of(tmp_path)) == "stopped: stopped on request"


def test_a_stop_request_shows_once_training_has_begun(tmp_path):
    writer = RunWriter(tmp_path)
    writer.phase("loading")
    writer.dir.stop_request.touch()
    assert status_of(tmp_path).state == "starting"
    writer.status("running")
    assert status_of(tmp_path).state == "stopping"


def test_hosts_that_a_run_waits_for_are_named(tmp_path):
    writer = RunWriter(tmp_path)
    writer.phase("starting")
    hosts = [{"name": name, "ranks": [0], "state": state} for name, state in (("a", "joined"), ("b", "waiting"))]
    write_json(writer.dir.hosts, {"hosts": hosts, "output_dir": ""})
    assert str(status_of(tmp_path)) == "starting: waiting for b to join"
    writer.dir.paste.touch()
    assert str(status_of(tmp_path)).endswith(f"the lines to paste there are in {writer.dir.paste}")
    write_json(writer.dir.hosts, {"hosts": hosts, "output_dir": "one folder"})
    assert str(status_of(tmp_path)) == "starting: all hosts have joined; output_dir is one folder"
    write_json(writer.dir.hosts, {"hosts": hosts[:1], "output_dir": "one folder"})
    assert str(status_of(tmp_path)) == "starting", "on one host there is nothing to wait for"


def test_a_broken_status_file_is_named(tmp_path):
    (tmp_path / "status.json").write_text("{")
    with pytest.raises(RunError, match=r"status\.json: cannot be read"):
        status_of(tmp_path)


def test_the_first_cause_of_a_failure_is_the_reason(tmp_path):
    RunWriter(tmp_path).manifest({"world_size": 4})
    RunWriter(tmp_path).status("failed", reason="gloo: connection lost", exit_code=1)
    reader = RunReader(tmp_path)
    assert reader.status().reason == "gloo: connection lost"
    (tmp_path / "log").mkdir()

    def failed(rank, time, reason, lost):
        record = {"rank": rank, "host": "h", "time": time, "reason": reason, "lost_connection": lost}
        write_json(reader.dir.failure(rank), record)

    failed(0, 1.0, "gloo: connection lost", True)
    failed(3, 1.1, "gloo: connection lost", True)
    assert reader.status().reason.startswith("rank 1, 2 ended and reported no reason")
    failed(2, 1.2, "out of memory", False)
    assert reader.status().reason == "rank 2 on h: out of memory"
    # The supervisor, who names the host, has compared all reports already.
    RunWriter(tmp_path).status("failed", reason="beta: silent", exit_code=1, host="beta", rank=None)
    assert (reader.status().reason, reader.status().host) == ("beta: silent", "beta")


def test_the_host_of_a_process_is_compared(tmp_path, monkeypatch):
    RunWriter(tmp_path).status("running")
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    assert status_of(tmp_path).state == "failed", "no heartbeat shows that it is alive"


def test_a_copy_of_a_live_folder_is_known_as_one_and_ends_nothing(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    run_dir.path.mkdir()
    launch_id = "3" * 32
    bystander = subprocess.Popen(["sleep", "600"], env={"HYNB_LAUNCH_ID": launch_id, "PATH": os.environ["PATH"]})
    try:
        membership = {"run_folder": str(run_dir.path)}
        launch = {"id": launch_id, "process": ProcessId.of(bystander.pid).record(), "membership": membership}
        write_json(run_dir.launch, launch)
        copy = Path(shutil.copytree(run_dir.path, tmp_path / "copy"))
        (tmp_path / "link").symlink_to(run_dir.path)
        assert [status_of(tmp_path / name).state for name in ("run", "link", "copy")] == ["starting"] * 2 + ["failed"]
        assert f"is a copy of {run_dir.path}" in status_of(copy).reason
        with pytest.raises(RunError, match=f"is a copy of {run_dir.path}.*nothing was ended"):
            Run(copy).kill()
        assert Run(copy).stop().state == "failed" and not (copy / "stop_request").exists()
        assert bystander.poll() is None and not list(tmp_path.glob("*/exit.json"))
        write_json(copy / "exit.json", {"id": launch_id, "state": "stopped", "reason": "killed on request"})
        assert str(status_of(copy)) == "stopped: killed on request", "the copy of an ended run"
        run_dir.path.rename(tmp_path / "moved")
        assert status_of(tmp_path / "moved").state == "starting"
    finally:
        bystander.kill()
        bystander.wait()
