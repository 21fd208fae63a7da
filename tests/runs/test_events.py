"""The run folder: one writer, any number of readers, states from files and real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

from hynb.errors import RunError
from hynb.files import write_json
from hynb.runs import ProcessId, RunReader, RunWriter, check_output_dir, effective_events

# A writer in a process of its own, which then waits to be ended.
WRITER = """
import sys, time
from hynb.runs import RunWriter
writer = RunWriter(sys.argv[1])
writer.status("running", global_step=0, max_steps=2000)
for step in range(1, int(sys.argv[2]) + 1):
    writer.event("log", step, loss=1 / step, note="字" * (step % 50))
    if step % 100 == 0:
        writer.beat(step)
print("written", flush=True)
if sys.argv[3:] == ["finish"]:
    writer.status("finished", global_step=2000, exit_code=0)
else:
    time.sleep(600)
"""


def writer(folder, count: int, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(folder), str(count), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_reader_sees_every_event_once_while_it_is_written(tmp_path):
    process = writer(tmp_path, 2000, "finish")
    reader, seen = RunReader(tmp_path), []
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(seen) < 2000:
        seen += reader.new_events()
    assert [event["global_step"] for event in seen] == list(range(1, 2001))
    assert seen == RunReader(tmp_path).events()
    assert process.wait(timeout=30) == 0
    process.stdout.close()
    status = reader.status()
    assert (status.state, status.global_step, status.max_steps, status.live) == ("finished", 2000, 2000, False)


def test_a_killed_writer_is_seen_as_failed(tmp_path):
    process = writer(tmp_path, 150)
    assert process.stdout.readline() == "written\n"
    status = RunReader(tmp_path).status()
    assert (status.state, status.global_step, status.live) == ("running", 100, True)
    process.kill()
    process.wait()
    process.stdout.close()
    status = RunReader(tmp_path).status()
    assert status.state == "failed" and "killed" in status.reason


def test_a_reused_pid_is_not_the_run(tmp_path):
    RunWriter(tmp_path).status("running", max_steps=5)
    assert RunReader(tmp_path).status().state == "running", "this very process is the writer"
    process = vars(ProcessId.of(os.getpid()))
    write_json(tmp_path / "status.json", {"state": "running", "process": process | {"create_time": 1.0}})
    assert RunReader(tmp_path).status().state == "failed"
    write_json(tmp_path / "status.json", {"state": "running", "process": process | {"host": "elsewhere"}})
    (tmp_path / "heartbeat").write_text("3\n")
    assert RunReader(tmp_path).status().state == "running", "another host is known by its heartbeat"
    os.utime(tmp_path / "heartbeat", (1, 1))
    assert RunReader(tmp_path).status().state == "failed"


def test_a_zombie_is_dead():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    identity = ProcessId.of(process.pid)
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert identity.alive() is False
    process.wait()


def test_a_torn_line_is_waited_for_and_left_behind(tmp_path):
    run = RunWriter(tmp_path)
    run.event("log", 1, loss=1.0)
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"v": 1, "kind": "log", "glob')
    reader = RunReader(tmp_path)
    assert [event["global_step"] for event in reader.new_events()] == [1]
    assert reader.new_events() == []
    # Its writer died; the next one begins a new line.
    RunWriter(tmp_path).event("log", 2, loss=0.5)
    assert [event["global_step"] for event in reader.new_events()] == [2]


def test_a_file_that_begins_anew_is_read_anew(tmp_path):
    RunWriter(tmp_path).event("log", 1)
    RunWriter(tmp_path).event("log", 2)
    reader = RunReader(tmp_path)
    assert len(reader.new_events()) == 2
    (tmp_path / "events.jsonl").unlink()
    RunWriter(tmp_path).event("log", 7)
    assert [event["global_step"] for event in reader.new_events()] == [7]


def test_steps_that_a_resume_did_again_are_left_out():
    def event(kind, step, **more):
        return {"kind": kind, "global_step": step} | more

    events = [event("start", 0), event("log", 1), event("log", 2), event("log", 3, loss="old"), event("stop", 3)]
    events += [event("resume", 2), event("log", 3, loss="new"), event("end", 3)]
    kept = effective_events(events)
    assert [(item["kind"], item["global_step"]) for item in kept] == [
        ("start", 0),
        ("log", 1),
        ("log", 2),
        ("resume", 2),
        ("log", 3),
        ("end", 3),
    ]
    assert kept[4]["loss"] == "new"


@pytest.mark.parametrize(
    ("state", "overwrite", "resuming", "says"),
    [
        ("running", True, True, "hynb stop"),
        ("finished", False, False, "overwrite_output_dir"),
        ("finished", True, False, None),
        ("failed", False, True, None),
        ("stopped", False, False, "resume_from_checkpoint"),
    ],
)
def test_where_a_run_may_start(tmp_path, state, overwrite, resuming, says):
    RunWriter(tmp_path).status(state)
    found = check_output_dir(tmp_path, overwrite=overwrite, resuming=resuming)
    assert (found == []) if says is None else (says in found[0])


def test_an_empty_folder_and_a_file(tmp_path):
    assert RunReader(tmp_path / "no").status().state == "absent"
    assert check_output_dir(tmp_path, overwrite=False, resuming=False) == []
    (tmp_path / "file").write_text("")
    assert "is a file" in check_output_dir(tmp_path / "file", overwrite=True, resuming=False)[0]


def test_a_snapshot_that_is_none_is_named(tmp_path):
    (tmp_path / "status.json").write_text("{")
    with pytest.raises(RunError, match=r"status\.json: cannot be read"):
        RunReader(tmp_path).status()


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
    assert reader.status().reason.startswith("rank 1, 2 ended without a word")
    failed(2, 1.2, "out of memory", False)
    assert reader.status().reason == "rank 2 on h: out of memory"
