"""The cache of a host, or of several that share a home folder: each file in it is made once, by one process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hynb.files import file_hash

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_NOTE_SECONDS = 10.0
# A file that was changed so recently could be changed again without a difference in its times.
_SETTLED_SECONDS = 2.0
# How file systems without locks answer.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
# Descriptors of the locks that this process holds.
_held: set[int] = set()


def cache_folder() -> Path:
    """Where decompressed files, indexes, token ids and results of checks are kept.

    It is `hynb` in XDG_CACHE_HOME or ~/.cache. Nothing is written beside the data: its folder may be read-only.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hynb"


def create_cache_folder(folder: Path) -> None:
    """Creates a folder of the cache, for its owner alone: what a cache holds is users' data.

    Raises:
        OSError: it cannot be created.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextlib.contextmanager
def locked(target: Path) -> Iterator[bool]:
    """Waits until no other process makes the target, and keeps them waiting; yields whether the lock is held.

    The kernel releases the lock of a process that has died, and over NFS the server does. Where the folder cannot be
    written or its file system has no locks, nobody waits: each process then makes the file under a name of its own.
    """
    path = target.with_name(f".{target.name}.lock")
    noted = time.monotonic()
    while (descriptor := _try_lock(path)) is None:
        if time.monotonic() - noted >= _NOTE_SECONDS:
            noted = time.monotonic()
            logger.info(f"waiting for another process that makes {target}")
        time.sleep(_POLL_SECONDS)
    if descriptor < 0:
        yield False
        return
    _held.add(descriptor)
    try:
        yield True
    finally:
        # Removed while it is held: whoever has opened it meanwhile sees that its name is gone.
        path.unlink(missing_ok=True)
        _held.discard(descriptor)
        os.close(descriptor)


def _try_lock(path: Path) -> int | None:
    """The descriptor of a locked file; None if another process holds the lock, -1 if there can be none."""
    try:
        create_cache_folder(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        return -1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == path.stat().st_ino:
            return descriptor
    except OSError as error:
        if error.errno in _NO_LOCKS:
            os.close(descriptor)
            return -1
    os.close(descriptor)
    return None


def release_inherited_locks() -> None:
    """To be called in a forked worker: it would hold its parent's locks after the parent's death."""
    for descriptor in list(_held):
        os.close(descriptor)
    _held.clear()


def made_once(target: Path, write: Callable[[Path], None], *, durable: bool = False) -> Path:
    """The target, which is complete or absent: the first process writes it while all others wait.

    Args:
        write: writes the file that it is given.
        durable: wait until the content is on the disk, for a file that readers could not tell from half of it.

    Raises:
        OSError: of `write`, or the folder cannot be written.
    """
    if target.exists():
        return target
    with locked(target) as alone:
        if target.exists():
            return target
        create_cache_folder(target.parent)
        with temporary(target, alone=alone) as path:
            write(path)
            if durable:
                # Renamed before its content is on the disk, it could be half a file after a power failure.
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            path.replace(target)
    return target


@contextlib.contextmanager
def temporary(target: Path, *, alone: bool) -> Iterator[Path]:
    """A name beside the target for a file that is to be renamed; what is left of it in the end is removed.

    Args:
        alone: no other process makes the target, so that remains of dead ones can be removed.
    """
    if alone:
        for remains in target.parent.glob(f".{target.name}.*.part"):
            remains.unlink(missing_ok=True)
    path = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def identity(path: Path) -> str | None:
    """What changes when the content of a file does, without reading it; None for a file that was just changed."""
    status = path.stat()
    if time.time() - max(status.st_ctime, status.st_mtime) < _SETTLED_SECONDS:
        return None
    facts = [str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def content_hash(path: Path) -> str:
    """SHA-256 of a file's content, which is read once per host.

    Raises:
        OSError: it cannot be read.
    """
    key = identity(path)
    if key is None:
        return file_hash(path)

    def write(target: Path) -> None:
        target.write_text(file_hash(path))

    try:
        known = made_once(cache_folder() / f"hash-{key}", write).read_text()
    except OSError:
        known = ""
    return known if len(known) == 64 else file_hash(path)
