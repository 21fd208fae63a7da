"""Events and status of a run folder: one writer, any number of readers, states from files and real processes."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from hynb.runs import RunReader, RunWriter, effective_events, progress_line
from hynb.runs import events as events_module

# A writer in a process of its own, which then waits until it is killed.
WRITER = """
import sys, time
from hynb.runs import RunWriter
writer = RunWriter(sys.argv[1])
writer.start()
writer.status("running", global_step=0, max_steps=2000)
for step in range(1, int(sys.argv[2]) + 1):
    writer.event("log", step, loss=1 / step, note="字" * (step % 50))
    writer.step(step)
writer.phase("saving")
print("written", flush=True)
if sys.argv[3:] == ["finish"]:
    writer.status("finished", global_step=2000, exit_code=0)
    writer.close()
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
    deadline = time.monotonic() + 60
    while (status := RunReader(tmp_path).status()).global_step != 150 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (status.state, status.global_step, status.live, status.phase) == ("running", 150, True, "saving")
    process.kill()
    process.wait()
    process.stdout.close()
    status = RunReader(tmp_path).status()
    assert status.state == "failed" and "killed" in status.reason and status.phase is None


def test_a_new_step_alone_is_written_less_often_than_all_else(tmp_path, monkeypatch):
    monkeypatch.setattr(events_module, "_STATUS_SECONDS", 3600.0)
    run, reader = RunWriter(tmp_path), RunReader(tmp_path)
    for step in (1, 2, 3):
        run.status("running", global_step=step, max_steps=9)
    assert reader.status().global_step == 1
    run.phase("saving")
    assert reader.status().global_step == 3
    run.status("running", global_step=4, max_steps=9)
    run.status("finished", global_step=4, exit_code=0)
    assert (reader.status().state, reader.status().global_step) == ("finished", 4)
    monkeypatch.setattr(events_module, "_STATUS_SECONDS", 0.0)
    run.status("finished", global_step=5, exit_code=0)
    assert reader.status().global_step == 5


def test_an_incomplete_line_is_left_for_later(tmp_path):
    run = RunWriter(tmp_path)
    run.event("log", 1, loss=1.0)
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"v": 1, "kind": "log", "glob')
    reader = RunReader(tmp_path)
    assert [event["global_step"] for event in reader.new_events()] == [1]
    assert reader.new_events() == []
    # Its writer died within the line; the next writer begins a new one.
    RunWriter(tmp_path).event("log", 2, loss=0.5)
    assert [event["global_step"] for event in reader.new_events()] == [2]


def test_a_file_that_was_replaced_is_read_from_its_beginning(tmp_path):
    RunWriter(tmp_path).event("log", 1)
    RunWriter(tmp_path).event("log", 2)
    reader = RunReader(tmp_path)
    assert len(reader.new_events()) == 2
    (tmp_path / "events.jsonl").unlink()
    RunWriter(tmp_path).event("log", 7)
    assert [event["global_step"] for event in reader.new_events()] == [7]


def test_events_of_steps_that_a_resume_repeated_are_left_out():
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
    ("step_seconds", "left"), [(1.0, "40 s"), (4.0, "2 min 40 s"), (300.0, "3 h 20 min"), (9000.0, "4.2 days")]
)
def test_the_progress_line_names_the_time_that_is_left_as_a_person_would(step_seconds, left):
    event = {"global_step": 10, "loss": 1.0, "learning_rate": 1e-4, "tokens_per_second": 9.4}
    event |= {"step_seconds": step_seconds}
    assert progress_line(event, 50) == f"step 10/50  loss 1.0000  lr 0.0001  9 tokens/s  left {left}"
    assert progress_line(event, None) == "step 10  loss 1.0000  lr 0.0001  9 tokens/s"
