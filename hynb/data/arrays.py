"""Arrays on disk: written into a zip file as NumPy does, mapped from it instead of loaded, and grown part by part."""

from __future__ import annotations

import json
import os
import struct
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

# The part of a column that stays in memory.
_BUFFER_BYTES = 1 << 18
_LOCAL_HEADER_BYTES = 30


def write_arrays(
    path: Path, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any], *, append: bool = False
) -> None:
    """Writes arrays and a JSON object as an .npz file.

    Args:
        append: keep what the file contains; the archive follows it.

    Raises:
        OSError: the file cannot be written.
    """
    stored = np.frombuffer(json.dumps(record).encode(), dtype=np.uint8)
    with zipfile.ZipFile(path, "a" if append else "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, values in {**arrays, "record": stored}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(values), allow_pickle=False)


def map_arrays(path: Path, *, verify: bool = False) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the JSON object of a file that `write_arrays` wrote; arrays are mapped, not in memory.

    Args:
        verify: read everything once and compare checksums.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if verify and (damaged := archive.testzip()):
                raise ValueError(f"{path}: {damaged} is damaged")
            arrays = {info.filename.removesuffix(".npy"): _mapped(path, info) for info in archive.infolist()}
        record = json.loads(bytes(arrays.pop("record")).decode())
    except (zipfile.BadZipFile, KeyError, EOFError, struct.error) as error:
        raise ValueError(f"{path}: {error}") from None
    return arrays, record


def _mapped(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER_BYTES)
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        read_header = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read_header(file)
        offset = file.tell()
    if not shape or not shape[0]:
        return np.zeros(shape, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape))


class Column:
    """An array that grows: its values are in a temporary file, or in memory where there is no space for one.

    Args:
        folder: for the temporary file; None for that of the system.
    """

    def __init__(self, dtype: Any, folder: Path | None) -> None:
        self._dtype = np.dtype(dtype)
        self._folder = folder
        self._parts: list[np.ndarray] = []
        self._bytes = 0
        self._file: IO[bytes] | None = None
        self._on_disk = True

    def append(self, values: Any) -> None:
        """Adds values at the end."""
        part = np.asarray(values, dtype=self._dtype)
        self._parts.append(part)
        self._bytes += part.nbytes
        if self._bytes >= _BUFFER_BYTES and self._on_disk:
            self._flush()

    def _flush(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  open as long as its arrays
            before = self._file.tell()
            try:
                self._file.write(np.concatenate(self._parts).tobytes())
                self._file.flush()
            except OSError:
                self._file.truncate(before)
                raise
        except OSError:
            self._on_disk = False
            return
        self._parts, self._bytes = [], 0

    def array(self) -> np.ndarray:
        """All values; read-only where they are mapped from the file."""
        if self._file is None:
            return np.concatenate(self._parts) if self._parts else np.zeros(0, self._dtype)
        if self._parts and self._on_disk:
            self._flush()
        stored = np.asarray(np.memmap(self._file, dtype=self._dtype, mode="r"))
        return np.concatenate([stored, *self._parts]) if self._parts else stored
