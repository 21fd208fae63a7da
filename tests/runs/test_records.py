"""Damaged records of a run folder end in a message that names file, field and rule, wherever they are read."""

from __future__ import annotations

import json
import os

import pytest
from shown_html import html_of, text_of

from hynb.cli import main
from hynb.errors import RunError
from hynb.files import write_json
from hynb.launch import Run
from hynb.runs import RunReader, RunWriter
from hynb.widgets import RunChooser, RunPanel

PROCESS = {"host": "elsewhere", "pid": 1, "create_time": 1.0}
LAUNCH = {"id": "1" * 32, "process": PROCESS}
RUNNING = {"state": "running", "process": PROCESS}
# File, its content, and what the message must say besides the file's name.
DAMAGED = [
    ("status.json", [], "must be a JSON object, not list"),
    ("status.json", "running", "must be a JSON object, not str"),
    ("status.json", {}, "has no state"),
    ("status.json", {"state": "ready"}, "state = 'ready': must be one of absent, starting, running"),
    ("status.json", {"state": ["running"]}, "state = ['running']: must be one of"),
    ("status.json", RUNNING | {"global_step": "7"}, "global_step = '7': must be an integer or null"),
    ("status.json", RUNNING | {"max_steps": 2.5}, "max_steps = 2.5: must be an integer or null"),
    ("status.json", RUNNING | {"max_steps": 10**400}, "must be an integer below 2^63 or null"),
    ("status.json", RUNNING | {"rank": True}, "rank = True: must be an integer or null"),
    ("status.json", RUNNING | {"reason": None}, "reason = None: must be a string"),
    ("status.json", {"state": "running", "process": 12}, "process = 12: must be an object"),
    ("status.json", {"state": "running", "process": {"pid": 1}}, "must be an object with host, boot_id, start_ticks"),
    ("status.json", {"state": "running", "process": PROCESS | {"pid": "1"}}, "with pid: a process id"),
    ("status.json", {"state": "running", "process": PROCESS | {"pid": -1}}, "with pid: a process id"),
    ("status.json", {"state": "running", "process": PROCESS | {"pid": 1 << 70}}, "with pid: a process id"),
    ("launch.json", [1], "must be a JSON object, not list"),
    ("launch.json", {"id": "1" * 32}, "has no process"),
    ("launch.json", {"process": PROCESS}, "has no id"),
    *(
        ("launch.json", LAUNCH | {"id": bad}, f"id = {bad!r}: must be the id of a launch")
        for bad in (None, "", "x", "1" * 31 + "\n", ["1" * 32], 1)
    ),
    ("launch.json", LAUNCH | {"started_at": "today"}, "started_at = 'today': must be a number"),
    ("launch.json", LAUNCH | {"membership": {"start_seconds": "9"}}, "with start_seconds: a number"),
    ("launch.json", LAUNCH | {"membership": {"hosts": ["a", "b"]}}, "with hosts: a list of pairs"),
    ("launch.json", LAUNCH | {"ssh": 3}, "ssh = 3: must be a string or null"),
    ("exit.json", 5, "must be a JSON object, not int"),
    ("exit.json", {"reason": "killed"}, "has no state"),
    ("exit.json", {"state": "failed", "exit_code": "1"}, "exit_code = '1': must be an integer or null"),
    ("exit.json", {"state": "failed", "host": 3}, "host = 3: must be a string or null"),
    ("hosts.json", None, "must be a JSON object, not NoneType"),
    ("hosts.json", {"hosts": "a, b"}, "hosts = 'a, b': must be a list"),
    ("hosts.json", {"hosts": [{"name": "a"}, {"name": "b"}]}, "must be a list, each item an object with state"),
    ("hosts.json", {"hosts": ["a", "b"]}, "must be a list, each item an object"),
    ("manifest.json", {"world_size": "4"}, "world_size = '4': must be an integer"),
    ("log/failure_rank0.json", {"rank": 0}, "has no host"),
    ("log/failure_rank0.json", {"rank": "0", "host": "h", "time": 1.0, "reason": "x"}, "rank = '0': must be an"),
]


@pytest.fixture(params=DAMAGED, ids=lambda item: f"{item[0]}: {item[2]}")
def damaged(request, tmp_path):
    """A run folder in which one file is damaged and is read, and what the message must say."""
    name, content, text = request.param
    writer = RunWriter(tmp_path / "run")
    writer.dir.config.write_text("")
    writer.dir.log.mkdir()
    if name in ("manifest.json", "log/failure_rank0.json"):
        writer.status("failed", reason="x", exit_code=1)
        writer.dir.failure(1).write_text(json.dumps({"rank": 1, "host": "h", "time": 1.0, "reason": "x"}))
        if name == "manifest.json":
            lost = {"rank": 1, "host": "h", "time": 1.0, "reason": "x", "lost_connection": True}
            writer.dir.failure(1).write_text(json.dumps(lost))
    elif name == "exit.json":
        write_json(writer.dir.launch, LAUNCH)
    elif name == "hosts.json":
        write_json(writer.dir.status, {"state": "starting", "process": PROCESS})
    (writer.dir.path / name).write_text(json.dumps(content))
    return writer.dir.path, name, text


def test_a_damaged_record_is_named_with_its_field_and_the_rule(damaged):
    folder, name, text = damaged
    with pytest.raises(RunError) as raised:
        RunReader(folder).status()
    for problem in raised.value.problems:
        assert problem.startswith(f"{folder / name}: ") and "remove" in problem and "restore it" in problem
    assert text in str(raised.value)


def test_commands_end_in_the_message(damaged, capsys):
    folder, name, text = damaged
    for command in (["status"], ["attach"], ["stop"], ["stop", "--kill"]):
        assert main([*command, str(folder)]) == 2, command
        output = capsys.readouterr()
        assert output.err.startswith("hynb: "), command
        if command != ["stop", "--kill"]:
            assert text in output.err and str(folder / name) in output.err


def test_the_panel_and_the_list_of_runs_show_the_message(damaged):
    folder, name, text = damaged
    panel = RunPanel(Run(folder))
    panel.stop_watching()
    assert text in text_of(html_of(panel)) and str(folder / name) in text_of(html_of(panel))
    assert panel.stop_button.disabled
    chooser = RunChooser(folder.parent)
    chooser.show_button.click()
    assert text_of(html_of(chooser)).count(text) == 2, "once in the list, once below it"


def test_keys_of_another_version_are_passed_over(tmp_path):
    process = PROCESS | {"container": "c"}
    write_json(tmp_path / "status.json", {"state": "running", "process": process, "node": "n"})
    write_json(tmp_path / "launch.json", {"id": "1" * 32, "process": process, "extra": 1})
    assert RunReader(tmp_path).status().state == "running", "a launch of another host, which may be starting up"
    os.utime(tmp_path / "launch.json", (1, 1))
    assert RunReader(tmp_path).status().state == "failed", "no heartbeat"


def test_events_without_kind_or_step_are_passed_over(tmp_path):
    writer = RunWriter(tmp_path)
    writer.event("log", 1, loss=1.0)
    for event in ({"v": 1}, {"v": 1, "kind": 3, "global_step": 1}, {"v": 1, "kind": "log", "global_step": "2"}, [1]):
        with writer.dir.events.open("a") as file:
            file.write(json.dumps(event) + "\n")
    writer.event("log", 2, loss=1.0)
    assert [event["global_step"] for event in RunReader(tmp_path).events()] == [1, 2]
