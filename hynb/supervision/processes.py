"""Finds and ends the processes of one launch, on this host and over ssh, and no others."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence

import psutil

from hynb.cluster import Ssh
from hynb.errors import RunError
from hynb.runs import is_launch_id
from hynb.supervision.membership import LAUNCH_VARIABLE


def processes_of(launch_id: str) -> list[psutil.Process]:
    """Processes on this host that carry a launch's id in their environment, except the caller.

    Raises:
        RunError: it is not the id of a launch, and processes without one could be taken for its own.
    """
    _check_id(launch_id)
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(LAUNCH_VARIABLE) == launch_id and process.pid != os.getpid():
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def kill_processes(launch_id: str, *, seconds: float = 3.0) -> None:
    """Kills every process of a launch on this host, except the caller, until none is left.

    Args:
        seconds: the longest time that this takes.
    """
    deadline = time.monotonic() + seconds
    while left := processes_of(launch_id):
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        _, alive = psutil.wait_procs(left, timeout=0.2)
        if not any(_is_running(process) for process in alive) or time.monotonic() > deadline:
            return


def kill_over_ssh(ssh: Ssh, hosts: Sequence[str], launch_id: str, *, seconds: float) -> None:
    """Kills the processes of one launch on hosts whose guard cannot be reached.

    Args:
        seconds: the longest wait; a host that answers later does it later.

    Raises:
        RunError: as `processes_of`.
    """
    _check_id(launch_id)
    # Whole variables are compared, so that no other job is touched; the host needs no Python for it.
    script = (
        f"for i in 1 2 3; do p=$(grep -lzxF {LAUNCH_VARIABLE}={launch_id} /proc/[0-9]*/environ 2>/dev/null "
        '| cut -d/ -f3); [ -z "$p" ] && exit 0; kill -9 $p 2>/dev/null; sleep 0.2; done'
    )
    threads = [threading.Thread(target=ssh.run, args=(host, ["sh", "-c", script]), daemon=True) for host in hosts]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _check_id(launch_id: object) -> None:
    if not is_launch_id(launch_id):
        raise RunError(f"{launch_id!r}: is not the id of a launch, so no process was ended")


def _is_running(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False
