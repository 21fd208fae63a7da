"""The identity of a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import need

from hynb.errors import RunError
from hynb.runs import ProcessId
from hynb.supervision import processes_of


def test_this_process_is_alive_and_another_host_is_unknown():
    identity = ProcessId.of(os.getpid())
    assert identity.alive() is True and ProcessId.from_record(identity.record()) == identity
    assert replace(identity, start_ticks=1).alive() is False, "a reused pid"
    assert replace(identity, boot_id="another").alive() is None, "after a restart, or on a copy of this machine"
    assert replace(identity, pid_namespace=1).alive() is None, "in a container of this machine"
    assert replace(identity, host="elsewhere").alive() is None


def test_a_zombie_is_not_alive():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    identity = ProcessId.of(process.pid)
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert identity.alive() is False
    process.wait()


@pytest.mark.parametrize("shift", ["-2d", "+2d"])
def test_a_step_of_the_clock_changes_no_identity(shift):
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    need(library is not None, "libfaketime is not installed")
    record = json.dumps(ProcessId.of(os.getpid()).record())
    script = (
        "import json, sys, time; from hynb.runs import ProcessId; print(time.time()); "
        "print(ProcessId.from_record(json.loads(sys.argv[1])).alive())"
    )
    environment = os.environ | {"LD_PRELOAD": str(library), "FAKETIME": shift}
    command = [sys.executable, "-c", script, record]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    clock, alive = done.stdout.split()
    assert abs(float(clock) - time.time()) > 86400 and alive == "True"


@pytest.mark.parametrize("launch_id", [None, "", "x", "1" * 31])
def test_what_is_no_id_of_a_launch_has_no_processes(launch_id):
    with pytest.raises(RunError, match="is not the id of a launch, so no process was ended"):
        processes_of(launch_id)
