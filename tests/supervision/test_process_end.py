"""How a process ended, known by another one than its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import need
from waiting import wait_until

from hynb.supervision.process_end import end_text, exit_code_of_zombie, memory_evidence, memory_kills

# Waits for nobody, as a launcher that looks once per second.
_PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("act", "code", "text"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, "was killed (SIGKILL): by a person or a program"),
        ("os.kill(os.getpid(), signal.SIGTERM)", -15, "was ended by SIGTERM: by a person, a program, or a scheduler"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", -11, "crashed (SIGSEGV)"),
        ("os.kill(os.getpid(), signal.SIGUSR1)", -10, "was ended by SIGUSR1"),
        ("os._exit(3)", 3, "ended with exit code 3 and reported no reason"),
    ],
)
def test_the_signal_that_ended_a_process_is_named(act, code, text):
    command = [sys.executable, "-c", _PARENT, f"import os, signal; {act}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout and parent.stdin
        pid = int(parent.stdout.readline())
        wait_until(lambda: exit_code_of_zombie(pid) is not None)
        assert exit_code_of_zombie(pid) == code
        assert end_text(code, "").startswith(text)
        parent.stdin.close()
    assert exit_code_of_zombie(pid) is None, "it is gone"
    assert exit_code_of_zombie(os.getpid()) is None, "it runs"


def test_the_kernels_end_for_lack_of_memory_is_proven_by_its_counter():
    root = Path("/sys/fs/cgroup/memory")
    need(os.geteuid() == 0 and (root / "memory.limit_in_bytes").exists(), "needs root and cgroup v1's memory")
    group = root / f"hynb-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(f"{64 << 20}")
        # Joins the group itself, and then takes more than it may.
        code = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0'); input(); b = bytearray(1 << 30)"
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True) as process:
            assert process.stdin
            wait_until(lambda: str(process.pid) in (group / "cgroup.procs").read_text().split())
            before = memory_kills([process.pid])
            assert before[str(group / "memory.oom_control")] == 0 and memory_evidence(before, before) == ""
            process.stdin.write("\n")
            process.stdin.close()
            wait_until(lambda: exit_code_of_zombie(process.pid) == -signal.SIGKILL)
            evidence = memory_evidence(before, memory_kills(files=before))
            assert evidence.startswith(f"oom_kill in {group}/memory.oom_control ") and evidence.endswith(
                "rose from 0 to 1"
            )
            assert "by the kernel for lack of host memory" in end_text(-signal.SIGKILL, evidence)
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()
