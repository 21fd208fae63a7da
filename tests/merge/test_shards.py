"""Safetensors headers and byte ranges are those of the safetensors library; broken files are named."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hynb.errors import ModelError
from hynb.merge import shards

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@pytest.fixture
def saved(tmp_path) -> Path:
    """A file with a tensor of each dtype, an empty tensor and a scalar."""
    generator = torch.Generator().manual_seed(0)
    tensors = {str(dtype): torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for dtype in DTYPES}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(7.0)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_a_header_is_read_as_the_library_reads_it(saved):
    shard, expected = shards.read_shard(saved), load_file(saved)
    assert {entry.name for entry in shard.tensors} == expected.keys()
    assert shard.metadata == {"format": "pt"} and shard.size_bytes == saved.stat().st_size
    for entry in shard.tensors:
        weight = expected[entry.name]
        assert entry.shape == tuple(weight.shape)
        assert bytes(shards.read_bytes(entry)) == bytes(weight.reshape(-1).view(torch.uint8).numpy()), entry.name


def test_a_written_header_is_read_by_the_library(saved, tmp_path):
    shard, made = shards.read_shard(saved), tmp_path / "made.safetensors"
    listed = [(entry.name, entry.dtype, entry.shape) for entry in shard.tensors]
    header = shards.file_header(listed, {"format": "pt"})
    made.write_bytes(header + b"".join(bytes(shards.read_bytes(entry)) for entry in shard.tensors))
    assert len(header) % 8 == 0, "the format aligns its data"
    expected, found = load_file(saved), load_file(made)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype and torch.equal(found[name], weight), name


@pytest.mark.parametrize("error", [None, errno.EXDEV, errno.EOPNOTSUPP])
def test_a_range_is_copied_by_the_kernel(tmp_path, monkeypatch, error):
    """On a file system without copy_file_range, sendfile copies the same bytes."""
    content = os.urandom(1 << 16)
    (tmp_path / "from").write_bytes(content)
    monkeypatch.setattr(shards, "_COPY_BYTES", 5000)
    if error:

        def fail(*_):
            raise OSError(error, "not supported")

        monkeypatch.setattr(os, "copy_file_range", fail)
    counts = []
    with (tmp_path / "from").open("rb") as source, (tmp_path / "to").open("wb") as target:
        numbers = source.fileno(), target.fileno()
        shards.copy_range(*numbers, 100, 60_100, at=8, advance=counts.append)
        shards.write_at(target.fileno(), b"12345678", 0)
    assert (tmp_path / "to").read_bytes() == b"12345678" + content[100:60_100]
    assert sum(counts) == 60_000 and len(counts) >= 12


def test_another_error_of_the_disk_is_raised(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "copy_file_range", fail)
    (tmp_path / "from").write_bytes(b"x" * 10)
    with (
        (tmp_path / "from").open("rb") as source,
        (tmp_path / "to").open("wb") as target,
        pytest.raises(OSError, match="no space left"),
    ):
        shards.copy_range(source.fileno(), target.fileno(), 0, 10, at=0, advance=lambda count: None)


def test_a_source_that_became_shorter_is_noticed(tmp_path):
    (tmp_path / "from").write_bytes(b"x" * 10)
    with (
        (tmp_path / "from").open("rb") as source,
        (tmp_path / "to").open("wb") as target,
        pytest.raises(ModelError, match="became shorter"),
    ):
        shards.copy_range(source.fileno(), target.fileno(), 0, 11, at=0, advance=lambda count: None)


def with_header(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    """Damages a file in its header alone."""

    def damage(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return damage


BROKEN = {
    "empty": lambda content: b"",
    "truncated in its header": lambda content: content[:40],
    "truncated in its data": lambda content: content[:-1],
    "longer than its header requires": lambda content: content + b"\0",
    "not safetensors": lambda content: b"\xff" * len(content),
    "a shape that does not fill its range": with_header(lambda header: header["scalar"].update(shape=[2])),
    "an unknown dtype": with_header(lambda header: header["scalar"].update(dtype="F5")),
    "overlapping ranges": with_header(lambda header: header["scalar"].update(data_offsets=[1, 5])),
    "no offsets": with_header(lambda header: header["scalar"].pop("data_offsets")),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named(saved, case):
    saved.write_bytes(BROKEN[case](saved.read_bytes()))
    with pytest.raises(ModelError, match=saved.name):
        shards.read_shard(saved)


def test_an_incomplete_model_folder_is_refused(saved, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ModelError, match="no safetensors file"):
        shards.model_shards(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="save the model as safetensors first"):
        shards.model_shards(folder)
    (folder / "pytorch_model.bin").unlink()
    for number in (1, 2):
        save_file({f"tensor{number}": torch.zeros(2)}, folder / f"model-{number}.safetensors")
    with pytest.raises(ModelError, match="2 safetensors files and no"):
        shards.model_shards(folder)
    index = folder / shards.INDEX_NAME
    whole = {"tensor1": "model-1.safetensors", "tensor2": "model-2.safetensors"}
    index.write_text(json.dumps({"weight_map": whole}))
    assert [shard.path.name for shard in shards.model_shards(folder)] == [
        "model-1.safetensors",
        "model-2.safetensors",
    ]
    for weight_map, message in (
        (whole | {"tensor3": "model-2.safetensors"}, "such as tensor3"),
        (whole | {"tensor3": "model-3.safetensors"}, "model-3.safetensors: the shard is missing"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelError, match=message):
            shards.model_shards(folder)
    index.write_text("{")
    with pytest.raises(ModelError, match="is not a valid index"):
        shards.model_shards(folder)
