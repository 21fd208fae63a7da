"""The heartbeat: written while its process lives, whatever holds the GIL, and no longer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil

from hynb.runs.heartbeat import Beat, Heartbeat, read_heartbeat

# A process with a heartbeat that then holds the GIL in a C function until the test opens the FIFO.
HOLDER = """
import ctypes, sys
from pathlib import Path
from hynb.runs.heartbeat import Heartbeat
heartbeat = Heartbeat(Path(sys.argv[1]), interval_seconds=0.1)
heartbeat.update(phase="loading")
ctypes.PyDLL(None).open(sys.argv[2].encode(), 0)
heartbeat.update(phase="saving")
heartbeat.stop()
"""


def until(condition, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def beat_after(path, earlier: Beat | None) -> Beat:
    """The next beat."""
    return until(lambda: (beat := read_heartbeat(path)) and beat != earlier and beat)


def test_phase_and_step_are_written_and_the_file_is_rewritten(tmp_path):
    path = tmp_path / "heartbeat"
    heartbeat = Heartbeat(path, interval_seconds=0.05)
    try:
        first = beat_after(path, None)
        assert (first.phase, first.global_step) == ("starting", 0) and abs(first.time - time.time()) < 60
        second = beat_after(path, first)
        assert (second.phase, second.global_step) == ("starting", 0) and second.time > first.time
        heartbeat.update(global_step=7)
        until(lambda: read_heartbeat(path).global_step == 7)
        heartbeat.update(phase="evaluating")
        until(lambda: read_heartbeat(path).phase == "evaluating")
        assert read_heartbeat(path).global_step == 7
    finally:
        heartbeat.stop()
    last = read_heartbeat(path)
    time.sleep(0.3)
    assert read_heartbeat(path) == last, "nothing is written after stop"
    assert [item.name for item in tmp_path.iterdir()] == ["heartbeat"], "the file was replaced atomically"


def test_a_new_phase_is_written_at_once(tmp_path):
    heartbeat = Heartbeat(tmp_path / "heartbeat", interval_seconds=3600)
    try:
        beat_after(tmp_path / "heartbeat", None)
        for phase in ("checking data", "meeting", "loading"):
            heartbeat.update(phase=phase)
            until(lambda phase=phase: read_heartbeat(tmp_path / "heartbeat").phase == phase)
    finally:
        heartbeat.stop()


def test_it_goes_on_while_the_gil_is_held(tmp_path):
    fifo, path = tmp_path / "fifo", tmp_path / "heartbeat"
    os.mkfifo(fifo)
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path), str(fifo)])
    try:
        beat = until(lambda: (beat := read_heartbeat(path)) and beat.phase == "loading" and beat)
        for _ in range(5):
            beat = beat_after(path, beat)
            assert beat.phase == "loading"
        with fifo.open("wb"):
            assert process.wait(60) == 0
        assert read_heartbeat(path).phase == "saving"
    finally:
        process.kill()
        process.wait()


def test_it_ends_with_its_process(tmp_path):
    fifo, path = tmp_path / "fifo", tmp_path / "heartbeat"
    os.mkfifo(fifo)
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path), str(fifo)])
    try:
        until(lambda: (beat := read_heartbeat(path)) and beat.phase == "loading")
        (child,) = psutil.Process(process.pid).children()
        assert child.is_running()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_a_child_that_was_killed_is_replaced(tmp_path):
    path = tmp_path / "heartbeat"
    heartbeat = Heartbeat(path, interval_seconds=0.05)
    try:
        beat_after(path, None)
        for child in psutil.Process().children():
            if "hynb.runs.heartbeat" in child.cmdline():
                child.kill()
                child.wait()
        path.unlink()
        heartbeat.update(global_step=2)
        assert beat_after(path, None).global_step == 2
    finally:
        heartbeat.stop()


def test_a_folder_that_cannot_be_written_for_a_while_stops_neither(tmp_path):
    folder = tmp_path / "run"
    heartbeat = Heartbeat(folder / "heartbeat", interval_seconds=0.05)
    try:
        heartbeat.update(phase="meeting")
        time.sleep(0.3)
        folder.mkdir()
        assert beat_after(folder / "heartbeat", None).phase == "meeting"
    finally:
        heartbeat.stop()


def test_what_is_not_a_heartbeat_is_none(tmp_path):
    assert read_heartbeat(tmp_path / "no") is None
    for text in ("", "{", "[]", '{"phase": "loading"}', "null", '"x"'):
        (tmp_path / "heartbeat").write_text(text)
        assert read_heartbeat(tmp_path / "heartbeat") is None
