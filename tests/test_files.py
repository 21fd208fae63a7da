"""Files that are replaced atomically, and hashes of their content."""

from __future__ import annotations

import errno
import hashlib
import json

import pytest

from hynb.errors import ModelError, RunError
from hynb.files import (
    INDEX_NAME,
    combined_hash,
    file_hash,
    is_there,
    read_json,
    read_weight_map,
    replace_text,
    size_text,
    write_json,
)


def test_json_is_read_back_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "status.json"
    assert read_json(path) is None
    for content in ({"state": "running", "文字": [1, None]}, {}):
        write_json(path, content)
        assert read_json(path) == content
    replace_text(path, '{"a": 1}')
    assert read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "cannot be read"), (b"\xff", "cannot be read"), (b"[1]", "must be a JSON object, not list")],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    path = tmp_path / "status.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match=rf"status\.json: {message}"):
        read_json(path)


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(RunError, match="cannot be read"):
        read_json(tmp_path)


def test_hashes_depend_on_content_and_order(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"abc" * 100_000)
    two.write_text(json.dumps({}))
    assert file_hash(one) == hashlib.sha256(one.read_bytes()).hexdigest()
    first, second = file_hash(one), file_hash(two)
    lists = ([first], [second], [first, second], [second, first])
    assert combined_hash([first]) == first and len(set(map(combined_hash, lists))) == 4
    two.rename(tmp_path / "three")
    assert file_hash(tmp_path / "three") == second


def test_a_look_that_a_network_disk_answers_with_an_error_saw_nothing(tmp_path, monkeypatch):
    path = tmp_path / "stop"
    path.touch()
    assert is_there(path) and not is_there(tmp_path / "other")

    def stat(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("os.stat", stat)
    with pytest.raises(OSError, match="Stale"):
        path.stat()
    assert not is_there(path)


@pytest.mark.parametrize(
    "content", ["{", "[]", "3", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index_of_a_model_is_named(tmp_path, content):
    assert read_weight_map(tmp_path) is None
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json: is not a valid index .*Download"):
        read_weight_map(tmp_path)


def test_the_index_of_a_model_names_a_shard_for_each_tensor(tmp_path):
    (tmp_path / INDEX_NAME).write_text('{"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    assert read_weight_map(tmp_path) == {"a": "1.safetensors", "b": "2.safetensors"}


def test_a_size_has_the_prefix_that_a_person_would_choose():
    texts = [size_text(value) for value in (0, 999, 1500, 12_345_678, 80e9, 999.6e9, 2.5e12)]
    assert texts == ["0 B", "999 B", "1.5 kB", "12.3 MB", "80 GB", "1 TB", "2.5 TB"]
