"""Removes registries (folders of notes in the temporary directory) whose guard was killed before it could do it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import time
from pathlib import Path

import psutil

from hynb.errors import RunError
from hynb.files import read_json
from hynb.runs import ProcessId
from hynb.supervision.membership import LAUNCH_VARIABLE

_NAME = re.compile(r"hynb-([0-9a-f]{32})-\d+")
# A rank leaves its note before its guard holds the registry, and a rank of another container looks dead from here.
_UNTOUCHED_SECONDS = 86400.0


def hold_registry(registry: Path) -> None:
    """Marks a registry as in use for as long as this process lives, in all containers that share its file system."""
    descriptor = os.open(registry / "guard", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_SH)


def remove_abandoned_registries(beside: Path) -> None:
    """Removes registries beside this host's own that belong to this user and to no living process, after a day.

    Args:
        beside: the registry that is in use now.
    """
    found = [item for item in beside.parent.glob("hynb-*") if _NAME.fullmatch(item.name) and item != beside]
    found = [item for item in found if _is_private(item)]
    if not found:
        return
    living = _living_launches()
    for folder in found:
        match = _NAME.fullmatch(folder.name)
        if match and match[1] not in living and not _is_used(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_private(folder: Path) -> bool:
    """Whether a folder is this user's, and open to nobody else."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and stat.S_IMODE(status.st_mode) == 0o700


def _living_launches() -> set[str]:
    living = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            living.add(process.environ().get(LAUNCH_VARIABLE, ""))
    return living


def _is_used(folder: Path) -> bool:
    """Whether the guard or a rank may be alive: on another host, as far as this one can tell, it is."""
    try:
        if time.time() - folder.stat().st_mtime < _UNTOUCHED_SECONDS:
            return True
        records = [read_json(path) for path in folder.glob("rank*.json")]
        if any(record is None or ProcessId.from_record(record).alive() is not False for record in records):
            return True
        with (folder / "guard").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except (OSError, RunError, KeyError, TypeError, ValueError):
        # Not readable as ours: left to its owner.
        return True
    return False
