"""Safetensors files as headers and byte ranges: read, copied by the kernel, written in place."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hynb.errors import ModelError

INDEX_NAME = "model.safetensors.index.json"
_HEADER_LIMIT_BYTES = 100 << 20
_COPY_BYTES = 64 << 20
DTYPE_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1},
}


@dataclass(kw_only=True, frozen=True)
class TensorEntry:
    """One tensor on the disk: where its bytes are and what they mean.

    begin, end: byte range in the file, from its start.
    """

    name: str
    shard: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.begin


@dataclass(kw_only=True, frozen=True)
class Shard:
    """One safetensors file: its tensors in the order of their bytes, and its free-form metadata."""

    path: Path
    tensors: tuple[TensorEntry, ...]
    metadata: dict[str, str]
    header_bytes: int
    size_bytes: int


def read_shard(path: Path) -> Shard:
    """A file's header, checked against the file's size.

    Raises:
        ModelError: truncated, corrupt, or no safetensors file, by name.
    """
    again = "Download or copy the file again"
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size_bytes < 8 or not 2 <= length <= min(_HEADER_LIMIT_BYTES, size_bytes - 8):
                raise ModelError(f"{path}: its header is cut off or no safetensors header. {again}")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        start = 8 + length
        tensors = tuple(
            sorted(
                (
                    TensorEntry(
                        name=name,
                        shard=path,
                        dtype=item["dtype"],
                        shape=tuple(item["shape"]),
                        begin=start + item["data_offsets"][0],
                        end=start + item["data_offsets"][1],
                    )
                    for name, item in header.items()
                ),
                key=lambda entry: entry.begin,
            )
        )
    except FileNotFoundError:
        raise ModelError(f"{path}: the shard is missing. Finish the download") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: no readable safetensors file ({error}). {again}") from None
    position = start
    for entry in tensors:
        expected = DTYPE_BYTES.get(entry.dtype, 0)
        for dimension in entry.shape:
            expected *= dimension
        if entry.begin != position or entry.size_bytes != expected:
            raise ModelError(f"{path}: tensor {entry.name} doesn't fill its place in the file. {again}")
        position = entry.end
    if position != size_bytes:
        raise ModelError(f"{path}: has {size_bytes} bytes, its header says {position}: it is cut off. {again}")
    return Shard(path=path, tensors=tensors, metadata=metadata, header_bytes=start, size_bytes=size_bytes)


def model_shards(folder: Path) -> list[Shard]:
    """The shards of a model folder, those of its index or the single file.

    Raises:
        ModelError: a shard is missing or corrupt, a tensor of the index is not in its shard, or there is none.
    """
    index_path = folder / INDEX_NAME
    if not index_path.is_file():
        single = sorted(folder.glob("*.safetensors"))
        if not single and any(folder.glob("pytorch_model*.bin")):
            raise ModelError(f"{folder}: has its weights as .bin files; save the model as safetensors first")
        if len(single) != 1:
            found = f"{len(single)} safetensors files and no {INDEX_NAME}" if single else "no safetensors file"
            raise ModelError(f"{folder}: has {found}: it is no complete model folder")
        return [read_shard(single[0])]
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index_path}: is no valid index ({error}). Download the file again") from None
    shards = [read_shard(folder / name) for name in names]
    present = {entry.name: shard.path.name for shard in shards for entry in shard.tensors}
    wrong = [name for name, shard in weight_map.items() if present.get(name) != shard]
    if wrong:
        raise ModelError(f"{index_path}: {len(wrong)} tensors are not in the shard it names, such as {wrong[0]}")
    return shards


def read_bytes(entry: TensorEntry) -> bytearray:
    """A tensor's bytes, in a buffer that may be written to."""
    buffer = bytearray(entry.size_bytes)
    with entry.shard.open("rb", buffering=0) as file:
        file.seek(entry.begin)
        view, done = memoryview(buffer), 0
        while done < len(buffer):
            count = file.readinto(view[done:])
            if not count:
                raise ModelError(f"{entry.shard}: ends inside tensor {entry.name}")
            done += count
    return buffer


def write_at(file_number: int, data: Any, offset: int) -> None:
    """Writes all of a buffer at a place in an open file."""
    view = memoryview(data).cast("B")
    while view:
        count = os.pwrite(file_number, view[: 1 << 30], offset)
        view, offset = view[count:], offset + count


def copy_range(source: int, target: int, begin: int, end: int, *, at: int, advance: Callable[[int], None]) -> None:
    """Copies bytes between open files inside the kernel.

    Args:
        source, target: file numbers.
        begin, end: range in the source.
        at: place in the target.
        advance: takes the bytes of each piece when it is copied.
    """
    while begin < end:
        length = min(_COPY_BYTES, end - begin)
        try:
            count = os.copy_file_range(source, target, length, begin, at)
        except OSError as error:
            # Two file systems, or one that has no such call: sendfile does the same through the page cache.
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            os.lseek(target, at, os.SEEK_SET)
            count = os.sendfile(target, source, begin, length)
        if not count:
            raise ModelError("a file became shorter while it was copied")
        begin, at = begin + count, at + count
        advance(count)


def header_of(tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """The first bytes of a safetensors file.

    Args:
        tensors: name, dtype and shape, in the order of their data.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        size_bytes = DTYPE_BYTES[dtype]
        for dimension in shape:
            size_bytes *= dimension
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + size_bytes],
        }
        position += size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # The format aligns the data at 8 bytes by spaces behind the JSON.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def entries(shards: list[Shard]) -> Iterator[TensorEntry]:
    """Every tensor of some shards."""
    for shard in shards:
        yield from shard.tensors


def is_weight_file(name: str) -> bool:
    """Whether a file name is that of weights or their index."""
    return bool(re.fullmatch(r".*\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?", name))
