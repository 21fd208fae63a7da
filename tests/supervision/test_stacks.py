"""Where a process's Python code is, asked from outside."""

from __future__ import annotations

import subprocess
import sys

from waiting import wait_until

from hynb.supervision.stacks import collect_stacks, innermost

WAITS = """
import sys, threading, time
from pathlib import Path
from hynb.supervision.stacks import write_stacks_on_signal

def waits_here():
    threading.Event().wait()

def works():
    waits_here()

threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
write_stacks_on_signal(Path(sys.argv[1]), 3)
works()
"""


def test_a_process_shows_where_it_is_and_goes_on(tmp_path):
    with subprocess.Popen([sys.executable, "-c", WAITS, str(tmp_path)]) as process:
        wait_until((tmp_path / "rank3.stacks").exists, "the rank")
        frames = []

        def is_there() -> bool:
            # Twice, each time what is new.
            frames[:] = innermost(collect_stacks(tmp_path, {3: process.pid, 4: process.pid})["3"])
            return "waits_here (<string>:7)" in frames

        wait_until(is_there, "the place where it waits")
        assert frames[frames.index("waits_here (<string>:7)") + 1] == "works (<string>:10)" and len(frames) <= 4
        assert frames[0].startswith("wait (threading.py:") and process.poll() is None
        process.kill()


def test_a_process_that_cannot_write_yet_gets_no_signal(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        assert collect_stacks(tmp_path, {0: process.pid}) == {} and process.poll() is None
        process.kill()
