"""Reads conversations line by line from files, converts other formats and names invalid lines, without torch."""

from __future__ import annotations

import contextlib
import functools
import glob
import gzip
import io
import itertools
import json
import logging
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from hynb.data.cache import cache_folder, content_hash, made_once
from hynb.errors import DataError
from hynb.files import combined_hash, unique_keys

logger = logging.getLogger(__name__)

_BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 20
# A JSON array has to be in memory as a whole, in which it takes several times its size.
_ARRAY_LIMIT_BYTES = 1 << 30
# Of a line, which is read as a whole and takes up to 24 times as much as JSON; ten million tokens are as long.
_RECORD_LIMIT_BYTES = 32 << 20
# How the name of a copy in the cache ends that has a line for each record of a JSON array.
_RECORDS = "-records.jsonl"
# Compressed bytes that are decompressed at once, in memory, where they may become 32,000 times as many.
_ZSTD_BLOCK_BYTES = 1 << 12
Paths = str | Path | Sequence[str | Path]


@dataclass(kw_only=True, frozen=True)
class Conversation:
    """One sample.

    Args:
        messages: each with `role` and `content`, and what else the record has for it.
        source: its location as `location` makes it.
        arguments: the record's other keys, such as `tools` and `reasoning_effort`.
    """

    messages: list[dict[str, Any]]
    source: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def replaced(self, **changes: Any) -> Conversation:
        """A copy with some fields replaced."""
        return replace(self, **changes)


def find_files(paths: Paths, parameter: str = "train_data_file") -> list[Path]:
    """The files that a path, several paths, or a text of paths and globs separated by commas name, each once.

    Args:
        parameter: the parameter that messages name.

    Raises:
        DataError: one message for each path that names no file.
    """
    files: list[Path] = []
    problems = []
    for item in _split_paths(paths):
        text = str(item).strip()
        if Path(text).is_file():
            found = [text]
        elif glob.has_magic(text):
            found = sorted(name for name in _glob(text) if Path(name).is_file())
            if not found:
                problems.append(f"{parameter} = {text}: no file matches this pattern")
        elif Path(text).is_dir():
            problems.append(f"{parameter} = {text}: is a folder; name its files, or write {text}/*.jsonl")
            continue
        else:
            problems.append(f"{parameter} = {text}: there is no such file")
            continue
        files += [Path(name) for name in found if Path(name) not in files]
    if problems or not files:
        raise DataError(problems or f"{parameter}: names no file")
    return files


def absolute_patterns(paths: str) -> str:
    """The same paths and globs, each absolute, separated by commas."""
    return ",".join(str(Path(str(item).strip()).expanduser().absolute()) for item in _split_paths(paths))


def _split_paths(paths: Paths) -> Sequence[str | Path]:
    if not isinstance(paths, (str, Path)):
        return paths
    # A file's name may have a comma.
    return [paths] if isinstance(paths, Path) or Path(paths).is_file() else str(paths).split(",")


def _glob(pattern: str) -> list[str]:
    return glob.glob(pattern, recursive=True)  # noqa: PTH207  Path.glob refuses absolute patterns


def lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Location and bytes of every line that is not blank, or of every record of a JSON array."""
    seekable = seekable_file(path)
    with open_data(seekable) as file:
        for number, line in enumerate(bounded_lines(file, path), 1):
            line = without_bom(line, number)
            if line.strip():
                yield location(path, seekable, number), line


def bounded_lines(file: BinaryIO | io.BufferedIOBase, path: Path) -> Iterator[bytes]:
    """The lines of an open file, none of which fills the memory.

    Args:
        path: the file that messages name.

    Raises:
        DataError: a line is too long.
    """
    for number, line in enumerate(iter(functools.partial(file.readline, _RECORD_LIMIT_BYTES + 1), b""), 1):
        if len(line) > _RECORD_LIMIT_BYTES:
            raise DataError(
                f"{path}:{number}: this line has more than {_RECORD_LIMIT_BYTES >> 20} MB; write one record per "
                "line, and divide longer ones"
            )
        yield line


def location(path: Path, seekable: Path, number: int) -> str:
    """Where a line is, for messages: file:line, or the number of the record in a JSON array.

    Args:
        seekable: what `seekable_file` returns for the file.
        number: of the line in it, from 1.
    """
    is_array = seekable != path and seekable.name.endswith(_RECORDS)
    return f"{path}: record {number}" if is_array else f"{path}:{number}"


def split_location(text: str) -> tuple[str, int]:
    """The file and the number of a location that `location` has made."""
    path, _, number = text.rpartition(":")
    return path, int(number.removeprefix(" record "))


@contextlib.contextmanager
def open_data(path: Path) -> Iterator[io.BufferedIOBase]:
    """The content of a file for reading, decompressed if its name ends in .gz or .zst.

    Raises:
        DataError: it cannot be read or decompressed.
    """
    try:
        with path.open("rb") as file, _decompressed(path, file) as content:
            yield content
    except OSError as error:
        # gzip's own errors are OSErrors without an errno.
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except EOFError:
        raise DataError(f"{path}: the compressed file is truncated; copy or download it again") from None
    except zlib.error as error:
        raise DataError(f"{path}: cannot be decompressed: {error}") from None


def _decompressed(path: Path, file: io.BufferedIOBase) -> contextlib.AbstractContextManager[io.BufferedIOBase]:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdReader(path, file), _BLOCK_BYTES)
    return contextlib.nullcontext(file)


class _ZstdReader(io.RawIOBase):
    """The content of a .zst file of one or several frames.

    zstandard's own `stream_reader` (0.25) ends without an error where a file is truncated.

    Raises:
        DataError: the file is not zstd.
        EOFError: the last frame is truncated.
    """

    def __init__(self, path: Path, file: io.BufferedIOBase) -> None:
        super().__init__()
        self._blocks = _zstd_blocks(path, file)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """True; BufferedReader asks."""
        return True

    # Python 3.11 has no type for writable buffers (collections.abc.Buffer comes with 3.12).
    def readinto(self, buffer: Any, /) -> int:
        """Fills a buffer as far as a decompressed block reaches; returns the number of bytes, 0 at the end."""
        while not self._rest:
            if (block := next(self._blocks, None)) is None:
                return 0
            self._rest = memoryview(block)
        target = memoryview(buffer)
        count = min(len(target), len(self._rest))
        target[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _zstd_blocks(path: Path, file: io.BufferedIOBase) -> Iterator[bytes]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    frame = None
    try:
        while block := file.read(_ZSTD_BLOCK_BYTES):
            while block:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data
                if frame.eof:
                    frame = None
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: cannot be decompressed: {error}") from None
    if frame is not None:
        raise EOFError


def seekable_file(path: Path) -> Path:
    """A file with one record per line that can be read by offset: itself, or a copy in the cache.

    Copies are made of compressed files, and of a JSON array, whose records get a line each: locations then have the
    number of the record.

    Raises:
        DataError: it cannot be read or decompressed, it is a JSON array that is invalid or too large, or one JSON
            object over several lines.
    """
    plain = _decompressed_file(path)
    try:
        with plain.open("rb") as file:
            beginning = file.read(_BLOCK_BYTES).removeprefix(_BOM).lstrip()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if beginning.startswith(b"["):
        return _lines_of_array(path, plain)
    if beginning.startswith(b"{"):
        _refuse_long_object(path, plain)
    return plain


def _refuse_long_object(path: Path, plain: Path) -> None:
    """Refuses a file that begins with an object over several lines, as programs write it for people to read.

    Raises:
        DataError: it does.
    """
    with plain.open("rb") as file:
        first = file.readline(_RECORD_LIMIT_BYTES).removeprefix(_BOM)
        try:
            json.loads(first or b"{}")
            return
        except (ValueError, RecursionError):
            # The first line is not a record.
            content = first + file.read(_RECORD_LIMIT_BYTES - len(first))
    try:
        text = content.decode("utf-8").lstrip()
        record, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return
    if "\n" not in text[:end]:
        return
    lists = [
        key for key, value in record.items() if isinstance(value, list) and key not in ("messages", "conversations")
    ]
    records = f".{lists[0]}[]" if len(record) == 1 and lists else "."
    raise DataError(
        f"{path}: begins with a JSON object over several lines, where one record per line is needed, or an array of "
        f"records. Write one per line: {_jq(path, records)}"
    )


def _jq(path: Path, records: str) -> str:
    """The command that writes a file's records line by line.

    Args:
        records: jq's expression for them.
    """
    reader = {".gz": "zcat", ".zst": "zstdcat"}.get(path.suffix)
    target = path.with_suffix("").stem if reader else path.stem
    # The file may have the name that the result would have.
    target += "-lines" if path.suffix == ".jsonl" else ""
    if reader:
        return f"{reader} {path.name} | jq -c '{records}' > {target}.jsonl"
    return f"jq -c '{records}' {path.name} > {target}.jsonl"


def _lines_of_array(path: Path, plain: Path) -> Path:
    if plain.stat().st_size > _ARRAY_LIMIT_BYTES:
        raise DataError(
            f"{path}: is a JSON array of more than {_ARRAY_LIMIT_BYTES >> 30} GB, which has to be read as a whole. "
            f"Write one record per line: {_jq(path, '.[]')}"
        )

    def write(target: Path) -> None:
        try:
            text = plain.read_bytes().removeprefix(_BOM).decode("utf-8")
            records = json.loads(text, object_pairs_hook=unique_keys)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{error.lineno}:{error.colno}: invalid JSON in an array of records: {error.msg}"
            ) from None
        except (UnicodeDecodeError, RecursionError, ValueError) as error:
            raise DataError(f"{path}: an array of records that cannot be read: {error}") from None
        with target.open("w", encoding="utf-8") as copy:
            copy.writelines(json.dumps(record) + "\n" for record in records)

    return _cached(path, f"{content_hash(plain)}{_RECORDS}", write)


def _decompressed_file(path: Path) -> Path:
    if path.suffix not in (".gz", ".zst"):
        return path

    def write(target: Path) -> None:
        with target.open("wb") as copy, open_data(path) as content:
            while block := content.read(_BLOCK_BYTES):
                try:
                    copy.write(block)
                except OSError as error:
                    raise DataError(_cannot_write(path, error)) from None

    return _cached(path, f"{content_hash(path)}.jsonl", write)


def _cached(path: Path, name: str, write: Callable[[Path], None]) -> Path:
    """A copy of a file in the cache, which one process of the host writes while the others wait."""
    target = cache_folder() / name

    def write_and_log(temporary: Path) -> None:
        write(temporary)
        logger.info(f"{path}: unpacked to {target}, {temporary.stat().st_size / 1e6:.0f} MB")

    try:
        return made_once(target, write_and_log, durable=True)
    except OSError as error:
        raise DataError(_cannot_write(path, error)) from None


def _cannot_write(path: Path, error: OSError) -> str:
    return (
        f"{path}: cannot be unpacked into {cache_folder()}: {error.strerror}. Set XDG_CACHE_HOME to a folder on a "
        "disk with space for it, or unpack the file yourself"
    )


def data_hash(paths: Paths) -> str:
    """SHA-256 of a file's content, or of several files' hashes in order.

    Raises:
        DataError: as `find_files`.
    """
    return combined_hash([content_hash(path) for path in find_files(paths)])


def without_bom(line: bytes, number: int) -> bytes:
    """A line without the byte order mark that the first line of a file may begin with."""
    return line.removeprefix(_BOM) if number == 1 else line


def split_share(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to evaluate on: a random fraction of all, in the order of the file.

    Args:
        share: the fraction to evaluate on, between 0 and 1; each side gets at least one sample.

    Raises:
        DataError: fewer than two samples, or a fraction out of range.
    """
    if not 0 < share < 1:
        raise DataError(f"eval_split = {share}: must be between 0 and 1")
    if count < 2:
        raise DataError(f"eval_split = {share}: {count} sample cannot be divided; give eval_data_file")
    held_out = sorted(random.Random(seed).sample(range(count), min(count - 1, max(1, round(count * share)))))
    is_held_out = bytearray(count)
    for index in held_out:
        is_held_out[index] = 1
    return list(itertools.compress(range(count), (not flag for flag in is_held_out))), held_out
