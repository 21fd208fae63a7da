"""Checkpoints whose states are written in the background, from a bounded copy in memory, while training goes on.

DeepSpeed's own engine for that (0.19.8, runtime/checkpoint_engine/decoupled_checkpoint_engine.py) hands GPU tensors
to a second process, whose errors end in a wait of five minutes. Here its engine serializes as ever, into memory.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from hynb.cluster import memory
from hynb.train.sealing import Sealing
from hynb.train.staging import PIECE_BYTES

# Of the host's free memory; the rest is for the page cache, through which the files go to the disk.
_SHARE_OF_MEMORY = 0.5
_SMALL_BYTES = 1 << 20


class BackgroundFiles:
    """Files whose bytes are copied at once, and which a thread writes.

    Args:
        limit_bytes: how many bytes wait at the most; who adds more waits for the disk.

    Attributes:
        paths: of all files so far.
        held_bytes: that wait now.
        failure: why they cannot be written; None while they can.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.paths: list[Path] = []
        self.held_bytes = 0
        self._limit = limit_bytes
        self._pieces: deque[tuple[Path, bytes]] = deque()
        self._changed = threading.Condition()
        self._is_complete = False
        self.failure: Exception | None = None
        # A run that fails does not wait for a checkpoint that will not be whole.
        self._thread = threading.Thread(target=self._write_all, daemon=True)
        self._thread.start()

    def open(self, path: Path) -> _BackgroundFile:
        """A file to write into."""
        self.paths.append(path)
        return _BackgroundFile(path, self._add)

    def wait(self) -> None:
        """Returns when all files have been written; none may be opened any more.

        Raises:
            OSError: one of them cannot be written.
        """
        with self._changed:
            self._is_complete = True
            self._changed.notify_all()
        self._thread.join()
        if self.failure:
            raise self.failure

    def _add(self, path: Path, piece: bytes) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self.failure or not self.held_bytes or self.held_bytes + len(piece) <= self._limit
            )
            if self.failure:
                raise self.failure
            self._pieces.append((path, piece))
            self.held_bytes += len(piece)
            self._changed.notify_all()

    def _write_all(self) -> None:
        written: set[Path] = set()
        try:
            while (taken := self._take()) is not None:
                path, piece = taken
                with path.open("ab" if path in written else "wb", buffering=0) as file:
                    left = memoryview(piece)
                    while left:
                        left = left[file.write(left) :]
                written.add(path)
                with self._changed:
                    self.held_bytes -= len(piece)
                    self._changed.notify_all()
        except Exception as error:
            with self._changed:
                self.failure = error
                self._pieces.clear()
                self._changed.notify_all()

    def _take(self) -> tuple[Path, bytes] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._pieces or self._is_complete)
            return self._pieces.popleft() if self._pieces else None


class _BackgroundFile:
    """What torch.save needs of a file."""

    def __init__(self, path: Path, add: Callable[[Path, bytes], None]) -> None:
        self._path, self._add = path, add
        self._small = bytearray()

    def write(self, data: bytes | memoryview) -> int:
        """Copies the data, and adds it in pieces."""
        view = memoryview(data).cast("B")
        if len(view) < _SMALL_BYTES:
            self._small += view
            if len(self._small) >= _SMALL_BYTES:
                self.flush()
            return len(view)
        self.flush()
        for begin in range(0, len(view), PIECE_BYTES):
            self._add(self._path, bytes(view[begin : begin + PIECE_BYTES]))
        return len(view)

    def flush(self) -> None:
        """Adds what has been collected of small data; torch.save calls it at the end."""
        if self._small:
            self._add(self._path, bytes(self._small))
            self._small.clear()


class UnfinishedCheckpoint:
    """A checkpoint that has not got its name yet.

    Args:
        target: its path when it is whole.
        facts: of the step at which it was saved, for its record.
        sealing: has its files flushed and digested.
        files: those that are written in the background; None where all are written.

    Attributes:
        seconds_by_part: how long its parts took.
        saving_seconds: how long training stood still until it was left to the background.
        began: when it was begun.
    """

    def __init__(
        self, target: Path, facts: dict[str, Any], sealing: Sealing, files: BackgroundFiles | None = None
    ) -> None:
        self.target, self.facts, self.sealing = target, facts, sealing
        self.seconds_by_part: dict[str, float] = {}
        self.saving_seconds = self.began = 0.0
        self._files = files
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Goes on in the background."""
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def is_written(self) -> bool:
        """Whether `wait` returns at once, or fails."""
        return self._thread is not None and not self._thread.is_alive()

    def wait(self) -> None:
        """Returns when this rank's part is on the disk and has its digests.

        Raises:
            OSError: a file cannot be written, read or flushed.
        """
        if self._thread is None:
            self._work()
        else:
            self._thread.join()
        if self._failure:
            raise self._failure

    def _work(self) -> None:
        started = time.monotonic()
        try:
            if self._files:
                self._files.wait()
                self.seconds_by_part["background"] = round(time.monotonic() - started, 2)
            started = time.monotonic()
            self.sealing.work()
            self.seconds_by_part["digests"] = round(time.monotonic() - started, 2)
        except Exception as error:
            self._failure = error


@contextmanager
def written_in_background(engine: Any, files: BackgroundFiles | None) -> Iterator[None]:
    """DeepSpeed's engine saves its states into such files.

    Args:
        engine: whose checkpoint engine `can_defer`.
        files: None to let it save as ever.
    """
    if files is None:
        yield
        return
    plain = engine.checkpoint_engine
    engine.checkpoint_engine = _DeferringEngine(plain, files)
    try:
        yield
    finally:
        engine.checkpoint_engine = plain


def can_defer(engine: Any) -> bool:
    """Whether DeepSpeed's engine saves its states by torch.save, and not in a way that the user has chosen."""
    return type(getattr(engine, "checkpoint_engine", None)) is TorchCheckpointEngine


def memory_for_copies(ranks_of_host: int) -> int:
    """Bytes that one rank may hold, of the host's free memory or that of its container."""
    facts = memory()
    free_bytes = min(facts["free_bytes"], facts["limit"]["free_bytes"] if facts["limit"] else facts["free_bytes"])
    return max(PIECE_BYTES, int(_SHARE_OF_MEMORY * free_bytes) // max(1, ranks_of_host))


class _DeferringEngine:
    """DeepSpeed's TorchCheckpointEngine, with other files."""

    def __init__(self, plain: Any, files: BackgroundFiles) -> None:
        self._plain, self._files = plain, files

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def save(self, state_dict: Any, path: str) -> None:
        """As deepspeed 0.19.8, runtime/checkpoint_engine/torch_checkpoint_engine.py."""
        file: Any = self._files.open(Path(path))
        try:
            torch.save(state_dict, file, _use_new_zipfile_serialization=self._plain.zipfile_serialization)
        except RuntimeError as error:
            # torch's text for whatever a file raises is that of a position in an archive.
            raise self._files.failure or error from error
