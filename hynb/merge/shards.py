"""Safetensors files as headers and byte ranges: read, copied inside the kernel, written in place.

The format is documented in https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hynb.errors import ModelError
from hynb.files import INDEX_NAME, read_weight_map

DTYPE_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1},
}
# What the parameter save_dtype can be, with the dtype's name in safetensors files; None: each tensor keeps its own.
SAVE_DTYPES: dict[str, str | None] = {"keep": None, "bf16": "BF16", "fp16": "F16", "fp32": "F32"}
# The limit of the safetensors library.
_MAX_HEADER_BYTES = 100 << 20
# Small enough for a progress report several times per second on a slow disk.
_COPY_BYTES = 64 << 20
# One pwrite call writes less than 2 GiB on Linux.
_WRITE_BYTES = 1 << 30
_COPY_AGAIN = "Download or copy the file again"


@dataclass(kw_only=True, frozen=True)
class TensorEntry:
    """One tensor of a safetensors file.

    Args:
        begin, end: byte range of its data, counted from the start of the file.
    """

    name: str
    shard: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Size of the tensor's data."""
        return self.end - self.begin


@dataclass(kw_only=True, frozen=True)
class Shard:
    """One safetensors file: its tensors, ordered by their position in the file, and its metadata."""

    path: Path
    tensors: tuple[TensorEntry, ...]
    metadata: dict[str, str]
    header_bytes: int
    size_bytes: int


def read_shard(path: Path) -> Shard:
    """The header of a safetensors file, checked against the size of the file.

    Raises:
        ModelError: the file is missing, truncated, corrupt or not a safetensors file.
    """
    try:
        size_bytes = path.stat().st_size
        header, data_start = _read_header(path, size_bytes)
        metadata = header.pop("__metadata__", {}) or {}
        tensors = [_entry(path, name, item, data_start) for name, item in header.items()]
    except FileNotFoundError:
        raise ModelError(f"{path}: the shard is missing. Finish the download") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error}). {_COPY_AGAIN}") from None
    tensors.sort(key=lambda entry: entry.begin)
    _check_ranges(path, tensors, data_start, size_bytes)
    return Shard(path=path, tensors=tuple(tensors), metadata=metadata, header_bytes=data_start, size_bytes=size_bytes)


def model_shards(folder: Path) -> list[Shard]:
    """The shards of a model folder: those listed in its index, or its single safetensors file.

    Raises:
        ModelError: the folder has no safetensors file, a shard is missing or corrupt, or a tensor is not in the
            shard that the index names.
    """
    weight_map = read_weight_map(folder)
    if weight_map is None:
        single = sorted(folder.glob("*.safetensors"))
        if not single and any(folder.glob("pytorch_model*.bin")):
            raise ModelError(f"{folder}: its weights are .bin files; save the model as safetensors first")
        if len(single) != 1:
            found = f"{len(single)} safetensors files and no {INDEX_NAME}" if single else "no safetensors file"
            raise ModelError(f"{folder}: has {found}, so the model folder is incomplete")
        return [read_shard(single[0])]
    shards = [read_shard(folder / name) for name in sorted(set(weight_map.values()))]
    present = {entry.name: shard.path.name for shard in shards for entry in shard.tensors}
    wrong = [name for name, shard in weight_map.items() if present.get(name) != shard]
    if wrong:
        raise ModelError(
            f"{folder / INDEX_NAME}: {len(wrong)} tensors are not in the shards that it names for them, such as "
            f"{wrong[0]}"
        )
    return shards


def entries(shards: Iterable[Shard]) -> Iterator[TensorEntry]:
    """The tensors of several shards, one shard after the other."""
    for shard in shards:
        yield from shard.tensors


def read_bytes(entry: TensorEntry) -> bytearray:
    """The data of a tensor, in a writable buffer.

    Raises:
        ModelError: the file has become shorter since its header was read.
    """
    buffer = bytearray(entry.size_bytes)
    with entry.shard.open("rb", buffering=0) as file:
        read_at(file.fileno(), memoryview(buffer), entry, 0)
    return buffer


def read_at(file_number: int, target: memoryview, entry: TensorEntry, offset: int) -> None:
    """Fills a buffer from an open file, from a byte of a tensor's data on.

    Raises:
        ModelError: the file has become shorter since its header was read.
    """
    position = entry.begin + offset
    while target:
        count = os.preadv(file_number, [target], position)
        if not count:
            raise ModelError(f"{entry.shard}: the file ends inside tensor {entry.name}")
        target, position = target[count:], position + count


def read_ahead(file_number: int, entry: TensorEntry) -> None:
    """Has the system read a tensor from disk while something else is computed."""
    # Only a hint, which some file systems refuse.
    with suppress(OSError):
        os.posix_fadvise(file_number, entry.begin, entry.size_bytes, os.POSIX_FADV_WILLNEED)


def write_at(file_number: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Writes a whole buffer into an open file, from `offset` bytes on."""
    view = memoryview(data).cast("B")
    while view:
        count = os.pwrite(file_number, view[:_WRITE_BYTES], offset)
        view, offset = view[count:], offset + count


def copy_range(source: int, target: int, begin: int, end: int, *, at: int, advance: Callable[[int], None]) -> None:
    """Copies bytes between open files inside the kernel.

    Args:
        source, target: file descriptors.
        begin, end: range in the source.
        at: offset in the target.
        advance: called with the number of bytes after each piece.

    Raises:
        ModelError: the source ends before `end`.
        OSError: the target cannot be written.
    """
    while begin < end:
        length = min(_COPY_BYTES, end - begin)
        try:
            count = os.copy_file_range(source, target, length, begin, at)
        except OSError as error:
            # Files on two file systems, or a file system without this call: sendfile goes through the page cache.
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            os.lseek(target, at, os.SEEK_SET)
            count = os.sendfile(target, source, begin, length)
        if not count:
            raise ModelError("a weight file became shorter while it was being copied")
        begin, at = begin + count, at + count
        advance(count)


def file_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file that come before its data.

    Args:
        tensors: name, dtype and shape of each tensor, in the order of their data.
        metadata: the file's metadata; left out when empty.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + DTYPE_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # The format aligns the data to 8 bytes with spaces after the JSON.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def is_weight_file(name: str) -> bool:
    """Whether a file name is that of a weight file or of an index of weight files."""
    return bool(re.fullmatch(r".*\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?", name))


def _read_header(path: Path, size_bytes: int) -> tuple[dict[str, Any], int]:
    """The JSON header of a file and the offset at which its data starts."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size_bytes < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, size_bytes - 8):
            raise ModelError(f"{path}: its header is truncated or not a safetensors header. {_COPY_AGAIN}")
        return json.loads(file.read(length)), 8 + length


def _entry(path: Path, name: str, item: Mapping[str, Any], data_start: int) -> TensorEntry:
    begin, end = item["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (begin, end, *item["shape"])):
        raise ValueError(f"tensor {name}: shape and data_offsets must be whole numbers")
    if not isinstance(item["dtype"], str):
        raise ValueError(f"tensor {name}: dtype must be a name")
    return TensorEntry(
        name=name,
        shard=path,
        dtype=item["dtype"],
        shape=tuple(item["shape"]),
        begin=data_start + begin,
        end=data_start + end,
    )


def _check_ranges(path: Path, tensors: Iterable[TensorEntry], data_start: int, size_bytes: int) -> None:
    """Checks that the tensors fill the file without gap or overlap."""
    position = data_start
    for entry in tensors:
        expected = DTYPE_BYTES.get(entry.dtype, 0) * math.prod(entry.shape)
        if entry.begin != position or entry.size_bytes != expected:
            raise ModelError(f"{path}: the byte range of tensor {entry.name} does not match its shape. {_COPY_AGAIN}")
        position = entry.end
    if position != size_bytes:
        raise ModelError(
            f"{path}: has {size_bytes} bytes where its header requires {position}: the file is truncated or damaged. "
            f"{_COPY_AGAIN}"
        )
