"""Token ids and labels that a check has found, kept in a file that training maps: nothing is tokenised twice.

The file has four bytes for each token, the id and in its highest bit whether it is trained on, and behind them an
.npz archive with one entry per sample: where it begins, its length and a checksum.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import multiprocessing
import os
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from hynb.data.arrays import map_arrays, write_arrays
from hynb.data.cache import cache_folder, create_cache_folder

logger = logging.getLogger(__name__)

_TRAINED = np.uint32(1 << 31)
_ID = np.uint32((1 << 31) - 1)
# Of a disk, the bytes that are left free for others.
RESERVE_BYTES = 1 << 30
# Bytes of token ids per byte of data, at which the space needed is estimated: 3.2 bytes of text per token.
_BYTES_PER_DATA_BYTE = 1.25
# A file that no run has opened for so long is removed, and one that a killed process has left unfinished.
_UNUSED_SECONDS = 30 * 24 * 3600
_UNFINISHED_SECONDS = 24 * 3600


def marked(ids: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Token ids with the highest bit set where a token is trained on; uint32 of shape (tokens,)."""
    return ids | (trained.astype(np.uint32) << np.uint32(31))


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk of a folder."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


class TokenWriter:
    """Writes the tokens of samples in any order; forked workers share it.

    Args:
        path: the file that is written.
        data_bytes: size of the data, by which the space needed is estimated.

    Attributes:
        problem: why no tokens are written; empty if they are.
    """

    def __init__(self, path: Path, data_bytes: int) -> None:
        self.path = path
        self.problem = ""
        self._descriptor = -1
        needed = int(data_bytes * _BYTES_PER_DATA_BYTE)
        try:
            # Workers reserve their part of the file in it; -1: a write has failed.
            self._position: Any = multiprocessing.get_context("fork").Value("q", 0)
            create_cache_folder(path.parent)
            free = free_bytes(path.parent)
            if free - needed < RESERVE_BYTES:
                self.problem = (
                    f"about {needed / 1e9:.2g} GB are needed and {free / 1e9:.2g} GB are free, of which "
                    f"{RESERVE_BYTES / 1e9:.2g} GB stay free"
                )
                return
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            self.problem = f"cannot be written: {error.strerror}"

    def write(self, tokens: np.ndarray) -> int:
        """Writes tokens as `marked` makes them; returns the position of the first one, -1 if they are not kept."""
        if self._descriptor < 0:
            return -1
        with self._position.get_lock():
            position = self._position.value
            if position < 0:
                return -1
            self._position.value += len(tokens)
        content = memoryview(tokens.tobytes())
        written = 0
        try:
            if free_bytes(self.path.parent) < RESERVE_BYTES:
                raise OSError(0, "the disk is nearly full")
            while written < len(content):
                written += os.pwrite(self._descriptor, content[written:], position * 4 + written)
        except OSError as error:
            logger.debug(f"{self.path}: {error}")
            with self._position.get_lock():
                self._position.value = -1
            return -1
        return position

    def finish(self, starts: np.ndarray, lengths: np.ndarray, checks: np.ndarray) -> bool:
        """Completes the file; returns whether it is complete, and otherwise sets `problem`."""
        if self._descriptor < 0:
            return False
        if self._position.value < 0:
            self.problem = "the disk or the quota is full"
            return False
        try:
            os.ftruncate(self._descriptor, self._position.value * 4)
            arrays = {"starts": starts, "lengths": lengths, "checks": checks}
            write_arrays(self.path, arrays, {"tokens": self._position.value}, append=True)
        except OSError as error:
            self.problem = f"cannot be written: {error.strerror}"
            return False
        return True

    def close(self) -> None:
        """Closes the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class TokenStore:
    """The tokens of all samples of a check, in order; read by processes that were forked or got it pickled.

    Args:
        path: a file that `TokenWriter` has completed.
        verify: compare the checksum of the table of samples; the tokens' own are compared as they are read.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, *, verify: bool = False) -> None:
        self.path = path
        arrays, record = map_arrays(path, verify=verify)
        try:
            self._starts, self.lengths, self._checks = (arrays[name] for name in ("starts", "lengths", "checks"))
            self._count = int(record["tokens"])
        except KeyError as error:
            raise ValueError(f"{path}: has no {error}") from None
        self._map: mmap.mmap | None = None
        self._is_damaged = False

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Token ids and whether each is trained on, both of shape (tokens,); None if they are damaged on the disk."""
        start, length = int(self._starts[index]), int(self.lengths[index])
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if start + length > self._count:
            return self._damaged(index)
        content = self._map[start * 4 : (start + length) * 4]
        if zlib.crc32(content) != int(self._checks[index]):
            return self._damaged(index)
        tokens = np.frombuffer(content, dtype=np.uint32)
        return tokens & _ID, tokens >= _TRAINED

    def _damaged(self, index: int) -> None:
        if not self._is_damaged:
            self._is_damaged = True
            logger.warning(
                f"{self.path}: the token ids of sample {index} are damaged: such samples are tokenised again, and "
                "the file is removed, so that the next check writes it again"
            )
            self.path.unlink(missing_ok=True)


def open_tokens(path: Path, *, verify: bool = False) -> TokenStore | None:
    """The tokens in a file; None if there is none, or it is damaged.

    Args:
        verify: as for `TokenStore`.
    """
    try:
        store = TokenStore(path, verify=verify)
        with contextlib.suppress(OSError):
            # So that it is not taken for unused.
            os.utime(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning(f"token ids that were kept cannot be used: {error}")
        return None
    return store


def kept_tokens(name: str) -> TokenStore | None:
    """The tokens in a file of this host's cache, which a check has kept there; None if there is no such file."""
    return open_tokens(cache_folder() / name)


def remove_unused(folder: Path) -> None:
    """Removes files of tokens that nobody has used for a month; a process that still maps one keeps it."""
    for pattern, seconds in (("tokens-*", _UNUSED_SECONDS), (".*.part", _UNFINISHED_SECONDS)):
        for path in folder.glob(pattern):
            try:
                if time.time() - path.stat().st_mtime > seconds:
                    path.unlink()
                    logger.info(f"{path} is removed: it was not used for {seconds / 86400:.0f} days")
            except OSError:
                continue
