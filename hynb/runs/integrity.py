"""Whether a checkpoint is whole: its files, their sizes and digests, and the headers of its weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hynb.errors import HynbError
from hynb.files import read_json, read_weight_map
from hynb.runs.records import read_record

# In a checkpoint: what it was made with, and the size and digest of each of its files.
CHECKPOINT_RECORD = "hynb_checkpoint.json"
# Several threads share the digest of one file, so it is that of the digests of its blocks.
_BLOCK_BYTES = 64 << 20
_READ_BYTES = 4 << 20
_THREADS = 4
# The limit of the safetensors library.
_MAX_HEADER_BYTES = 100 << 20


def checkpoint_files(folder: Path, *, without: Collection[str] = ()) -> dict[str, int]:
    """The size in bytes of each file in a checkpoint but its record, by its path in the folder.

    Args:
        without: files that are still being written, at which this host does not look: a network disk would go on
            showing it their size of now.
    """
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")))
    files = {name: folder / name for name in names if name not in without and name != CHECKPOINT_RECORD}
    return {name: path.stat().st_size for name, path in files.items() if path.is_file()}


def file_digests(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size in bytes and digest of files in a folder, by their names.

    The digest is the SHA-256 of the SHA-256 digests of a file's blocks of 64 MB.

    Raises:
        OSError: a file cannot be read.
    """
    sizes = {name: (folder / name).stat().st_size for name in names}
    blocks = [(name, at) for name, size in sizes.items() for at in range(0, max(1, size), _BLOCK_BYTES)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda block: _block_digest(folder / block[0], block[1]), blocks))
    wholes = {name: hashlib.sha256() for name in sizes}
    for (name, _), digest in zip(blocks, found, strict=True):
        wholes[name].update(digest)
    return {name: {"bytes": size, "sha256": wholes[name].hexdigest()} for name, size in sizes.items()}


def flush(folder: Path, names: Iterable[str]) -> None:
    """Returns when files of a folder, and the folder itself, are on the disk and no longer only in memory.

    Raises:
        OSError: the disk reports an error.
    """
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda name: _flush_path(folder / name), names))
    for parent in sorted({(folder / name).parent for name in names} | {folder}):
        _flush_path(parent)


def check_files(folder: Path, *, deep: bool = False, names: Sequence[str] | None = None) -> list[str]:
    """What is wrong with the files of a checkpoint, one message per file; empty when nothing is.

    Args:
        deep: compare digests too, which reads every file.
        names: only these files; None for all.
    """
    try:
        record = read_record(folder / CHECKPOINT_RECORD)
        listed: dict[str, dict[str, Any]] = (record or {}).get("files") or {}
        chosen = {name: entry for name, entry in listed.items() if names is None or name in names}
        problems = [text for name, entry in chosen.items() if (text := _size_problem(folder / name, entry["bytes"]))]
        if names is None:
            problems += _content_problems(folder)
        if deep and not problems:
            found = file_digests(folder, chosen)
            problems = [
                f"{folder / name}: its content has changed since it was written: its digest is "
                f"{found[name]['sha256'][:12]}…, in {CHECKPOINT_RECORD} {entry['sha256'][:12]}…"
                for name, entry in chosen.items()
                if found[name]["sha256"] != entry["sha256"]
            ]
    except HynbError as error:
        return error.problems
    except OSError as error:
        return [f"{error.filename or folder}: cannot be read ({error.strerror})"]
    return problems


def has_digests(folder: Path) -> bool:
    """Whether a checkpoint has a record with the digests of its files.

    Raises:
        RunError: the record is damaged.
    """
    return bool((read_record(folder / CHECKPOINT_RECORD) or {}).get("files"))


def _size_problem(path: Path, size_bytes: int) -> str:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return f"{path}: is missing"
    return "" if found == size_bytes else f"{path}: has {found:,} bytes, was written with {size_bytes:,}"


def _content_problems(folder: Path) -> list[str]:
    """What shows without a record: JSON that cannot be read, shards that are missing, headers that do not fit."""
    problems = []
    try:
        weight_map = read_weight_map(folder) or {}
    except HynbError as error:
        return error.problems
    names = set(weight_map.values())
    problems += [f"{folder / name}: is missing" for name in sorted(names) if not (folder / name).is_file()]
    for path in sorted(folder.glob("*.safetensors")):
        if problem := header_problem(path):
            problems.append(f"{path}: {problem}")
    for name in ("trainer_state.json", "config.json", "adapter_config.json"):
        try:
            read_json(folder / name)
        except HynbError as error:
            problems += error.problems
    return problems


def header_problem(path: Path) -> str:
    """Why the header of a safetensors file does not fit its size; empty when it does.

    Raises:
        OSError: it cannot be read.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 0 < header_bytes <= min(size_bytes - 8, _MAX_HEADER_BYTES):
            return "is not a whole safetensors file: its header is longer than the file"
        data = file.read(header_bytes)
    try:
        header = json.loads(data)
        end = max((item["data_offsets"][1] for name, item in header.items() if name != "__metadata__"), default=0)
        expected = 8 + header_bytes + end
        wrong = expected != size_bytes
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return "has a header that is damaged"
    return f"has {size_bytes:,} bytes, by its header {expected:,}" if wrong else ""


def _block_digest(path: Path, start: int) -> bytes:
    digest, left = hashlib.sha256(), _BLOCK_BYTES
    buffer = bytearray(_READ_BYTES)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (count := file.readinto(memoryview(buffer)[: min(left, _READ_BYTES)])):
            digest.update(memoryview(buffer)[:count])
            left -= count
    return digest.digest()


def _flush_path(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        # Some network disks cannot flush a folder.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(number)
    finally:
        os.close(number)
