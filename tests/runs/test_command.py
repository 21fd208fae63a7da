"""`hynb checkpoints`: a line per checkpoint, its verdict, and the exit code."""

from __future__ import annotations

import json

import pytest
from checkpoints import make_checkpoint

from hynb.cli import main
from hynb.files import read_json, write_json
from hynb.runs import CHECKPOINT_RECORD, RunDir


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "a run")
    for step in (5, 10):
        path = make_checkpoint(run.checkpoint(step), step) / CHECKPOINT_RECORD
        write_json(path, (read_json(path) or {}) | {"loss": 1.25 * step, "saved_at": 1e9})
    return run


def test_whole_checkpoints(run, capsys):
    assert main(["checkpoints", str(run.path)]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "size", "loss", "saved", "verdict"]
    assert first.split()[0] == "5" and "6.2500" in first and "2001-09-0" in first
    assert second.endswith("whole, by sizes and headers")
    assert main(["checkpoints", str(run.path), "--verify"]) == 0
    assert capsys.readouterr().out.count("whole, by all digests") == 2


def test_a_truncated_file_is_found_without_digests(run, capsys):
    path = run.checkpoint(10) / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["checkpoints", str(run.path)]) == 1
    _, first, second = capsys.readouterr().out.splitlines()
    assert "whole" in first and f"damaged: {path}: has " in second


def test_a_flipped_bit_is_found_by_the_digests(run, capsys):
    path = run.checkpoint(5) / "global_step5" / "optim_states.pt"
    content = bytearray(path.read_bytes())
    content[99] ^= 4
    path.write_bytes(content)
    assert main(["checkpoints", str(run.path)]) == 0
    capsys.readouterr()
    assert main(["checkpoints", str(run.path), "--verify", "--json"]) == 1
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["global_step"] == 5 and str(path) in first["damage"][0] and second["damage"] == []


def test_damaged_and_missing_records(run, capsys):
    (run.checkpoint(5) / CHECKPOINT_RECORD).write_text("[")
    (run.checkpoint(10) / CHECKPOINT_RECORD).unlink()
    assert main(["checkpoints", str(run.path)]) == 1
    _, first, second = capsys.readouterr().out.splitlines()
    assert f"damaged: {run.checkpoint(5) / CHECKPOINT_RECORD}: cannot be read" in first
    assert second.endswith("no digests: resuming needs trust_checkpoint")


def test_a_folder_without_checkpoints(tmp_path, capsys):
    assert main(["checkpoints", str(tmp_path)]) == 2
    assert "has no checkpoints" in capsys.readouterr().err
    assert main(["checkpoints", str(tmp_path / "no")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
