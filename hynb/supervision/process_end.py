"""How a process of this host has ended, which only its parent learns: by which signal, and whether for memory."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import psutil

from hynb.runs import stat_fields

# The kernel's counters of processes that it has ended for lack of memory: of a group of processes, by the version of
# its interface (Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst), and of the whole host.
_GROUP_FILES = ("memory.events", "memory.oom_control")
_HOST_FILE = Path("/proc/vmstat")
_GROUPS = Path("/sys/fs/cgroup")


def exit_code_of_zombie(pid: int) -> int | None:
    """The exit code of a process that has ended and whose parent has not looked yet; negative for a signal.

    None where it runs, where it is gone, and where it belongs to another user.
    """
    with contextlib.suppress(OSError, ValueError, psutil.Error):
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            # Field 52 (man proc_pid_stat): as waitpid reports it.
            return os.waitstatus_to_exitcode(int(stat_fields(pid)[49]))
    return None


def memory_kills(pids: Iterable[int] = (), files: Iterable[str] = ()) -> dict[str, int]:
    """How many processes the kernel has ended for lack of memory so far, by the file that counts them.

    Args:
        pids: processes whose groups are looked at; the file of the whole host always is.
        files: further files, as of groups whose processes have ended.
    """
    counting = {_HOST_FILE, *map(Path, files)}
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
                _, controllers, group = line.split(":", 2)
                root = _GROUPS / "memory" if "memory" in controllers.split(",") else _GROUPS
                if controllers in ("", "memory") or "memory" in controllers.split(","):
                    counting |= {root / group.lstrip("/") / name for name in _GROUP_FILES}
    counts = {}
    for file in counting:
        with contextlib.suppress(OSError, ValueError):
            lines = (line.split() for line in file.read_text().splitlines())
            counts |= {str(file): int(words[1]) for words in lines if words and words[0] == "oom_kill"}
    return counts


def end_text(exit_code: int, killed_for_memory: str) -> str:
    """How a process has ended, as a text that follows its name; a signal is given by its name.

    Args:
        killed_for_memory: the counter that has risen, or empty; as `memory_evidence` tells it.
    """
    if exit_code >= 0:
        return f"ended with exit code {exit_code} and reported no reason, as by os._exit in a library"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    if -exit_code == signal.SIGKILL:
        if killed_for_memory:
            return (
                f"was ended by the kernel for lack of host memory (SIGKILL; {killed_for_memory}). Use a preset with "
                "less offload to host memory, fewer dataloader_num_workers, or a host with more memory"
            )
        return (
            "was killed (SIGKILL): by a person or a program, as with kill -9, or probably by the system for lack of "
            "memory, of which this host shows no sign; `dmesg` may"
        )
    if -exit_code == signal.SIGTERM:
        return "was ended by SIGTERM: by a person, a program, or a scheduler that takes the host away"
    if -exit_code in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT):
        return (
            f"crashed ({name}): an error in native code of a library, a driver or the memory of this host; the end "
            "of its log may name it"
        )
    return f"was ended by {name}"


def launcher_end_text(exit_code: int) -> str:
    """How DeepSpeed's launcher has ended, whose exit code is often that of a rank."""
    return f"the launcher {end_text(exit_code, '') if exit_code < 0 else f'ended with exit code {exit_code}'}"


def memory_evidence(before: dict[str, int], after: dict[str, int]) -> str:
    """Which counter of `memory_kills` has risen, the one of a group of processes first; empty where none has."""
    risen = [file for file, count in after.items() if count > before.get(file, count)]
    risen.sort(key=lambda file: file == str(_HOST_FILE))
    if not risen:
        return ""
    return f"oom_kill in {risen[0]} rose from {before[risen[0]]} to {after[risen[0]]}"
