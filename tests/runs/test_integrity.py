"""Whether a checkpoint is whole: every kind of damage is found and named with its file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from checkpoints import make_checkpoint

from hynb.runs import (
    CHECKPOINT_RECORD,
    RunDir,
    check_files,
    checkpoint_files,
    file_digests,
    surplus_checkpoints,
)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint-3")


def change(path: Path, at: int) -> None:
    """Flips one bit."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_whole_checkpoint_has_no_problem(checkpoint):
    assert check_files(checkpoint) == check_files(checkpoint, deep=True) == []
    assert "global_step3/optim_states.pt" in checkpoint_files(checkpoint)


def test_the_digest_is_that_of_the_digests_of_blocks(tmp_path):
    contents = {"empty": b"", "small": b"x" * 100, "large": bytes(range(256)) * ((65 << 20) // 256)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    found = file_digests(tmp_path, contents)
    for name, content in contents.items():
        blocks = [content[at : at + (64 << 20)] for at in range(0, max(1, len(content)), 64 << 20)]
        expected = hashlib.sha256(b"".join(hashlib.sha256(block).digest() for block in blocks)).hexdigest()
        assert found[name] == {"bytes": len(content), "sha256": expected}, name


@pytest.mark.parametrize("name", ["model-1.safetensors", "global_step3/optim_states.pt", "trainer_state.json"])
def test_a_missing_and_a_truncated_file_are_found_at_once(checkpoint, name):
    path = checkpoint / name
    content = path.read_bytes()
    path.write_bytes(content[:-7])
    problems = check_files(checkpoint)
    assert any(problem.startswith(f"{path}: has ") for problem in problems)
    path.unlink()
    assert f"{path}: is missing" in check_files(checkpoint)


def test_a_flipped_bit_is_found_by_the_digest(checkpoint):
    path = checkpoint / "global_step3" / "optim_states.pt"
    change(path, 5000)
    assert check_files(checkpoint) == []
    (problem,) = check_files(checkpoint, deep=True)
    assert problem.startswith(f"{path}: its content has changed")
    assert check_files(checkpoint, deep=True, names=["trainer_state.json"]) == [], "another rank's share"


def test_weights_are_checked_without_a_record_too(checkpoint):
    (checkpoint / CHECKPOINT_RECORD).unlink()
    assert check_files(checkpoint) == []
    weights = checkpoint / "model-1.safetensors"
    content = weights.read_bytes()
    for damaged, text in (
        (content[:-4], "by its header"),
        (content[:20], "its header is longer than the file"),
        (content[:5], "its header is longer than the file"),
        (content[:8] + b"?" + content[9:], "a header that is damaged"),
    ):
        weights.write_bytes(damaged)
        (problem,) = check_files(checkpoint)
        assert problem.startswith(f"{weights}: ") and text in problem
    weights.unlink()
    assert check_files(checkpoint) == [f"{weights}: is missing"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[1]", "must be a JSON object, not list"),
        ('{"files": {"a', "cannot be read"),
        ('{"files": []}', "files = []: must be an object"),
        ('{"files": {"a": 3}}', "must be an object with a: an object"),
        ('{"files": {"a": {"bytes": "1", "sha256": ""}}}', "bytes: an integer"),
        ('{"files": {"../a": {"bytes": 1, "sha256": ""}}}', "a path inside the folder"),
        ('{"world_size": "2"}', "world_size = '2': must be an integer"),
        ('{"made_with": 7}', "made_with = 7: must be an object"),
    ],
)
def test_a_damaged_record_is_named(checkpoint, content, text):
    path = checkpoint / CHECKPOINT_RECORD
    path.write_text(content)
    (problem,) = check_files(checkpoint)
    assert problem.startswith(f"{path}: ") and text in problem


def test_a_damaged_state_of_the_trainer_is_named(checkpoint):
    (checkpoint / CHECKPOINT_RECORD).unlink()
    path = checkpoint / "trainer_state.json"
    path.write_text(json.dumps([1]))
    (problem,) = check_files(checkpoint)
    assert problem.startswith(f"{path}: must be a JSON object")


def test_damaged_checkpoints_do_not_count_for_the_limit(tmp_path):
    run = RunDir(tmp_path)
    for step in (5, 10, 15, 20):
        make_checkpoint(run.checkpoint(step), step)
    names = [path.name for path in surplus_checkpoints(run, 2)]
    assert names == ["checkpoint-5", "checkpoint-10"]
    (run.checkpoint(15) / "model-1.safetensors").unlink()
    assert [path.name for path in surplus_checkpoints(run, 2)] == ["checkpoint-5"]
    assert surplus_checkpoints(run, 4) == [], "too few whole ones: none is removed"
