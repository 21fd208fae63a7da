"""The command `hynb check-data`."""

from __future__ import annotations

import argparse

import pytest
from tiny import tiny_data

from hynb.cli import main
from hynb.data.command import add_arguments, run
from hynb.errors import DataError, ModelError


def run_command(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(word) for word in words]))


def test_the_command(tokenizer_folder, tmp_path, capsys):
    path = tiny_data(tmp_path / "a.jsonl", 5)
    words = ["--tokenizer_name_or_path", tokenizer_folder, "--max_seq_length", 500, "--preview", 1]
    assert run_command(path, *words) == 0
    printed = capsys.readouterr().out
    assert "5 lines = 5 samples + 0 rejected" in printed and "⟦" in printed
    path.write_text(path.read_text() + "x\n")
    assert run_command(path, *words) == 2 and f"{path}:6:1: invalid JSON" in capsys.readouterr().out
    assert run_command(path, *words, "--on_bad_sample", "skip") == 0
    assert run_command(path) == 2
    with pytest.raises(DataError, match="no such folder"):
        run_command(path, "--tokenizer_name_or_path", tmp_path / "none")
    with pytest.raises(DataError, match="max_seq_length = 0"):
        run_command(path, "--max_seq_length", 0)


def test_a_folder_without_a_tokenizer_is_named_in_one_line(tokenizer_folder, tmp_path):
    path = tiny_data(tmp_path / "a.jsonl", 5)
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in (("config.json", '{"model_type": "hunyuan_v1_dense"}'), ("tokenizer_config.json", "{}")):
        with pytest.raises(ModelError) as caught:
            run_command(path, "--tokenizer_name_or_path", folder)
        (problem,) = caught.value.problems
        assert problem.startswith(f"{folder}: the tokenizer cannot be loaded: MISSING: ") and "\n" not in problem
        assert "copy the tokenizer's files" in problem and "tokenizer.json" in problem
        (folder / name).write_text(content)
    (folder / "tokenizer.json").write_text('{"broken": 1}')
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded: ") as caught:
        run_command(path, "--tokenizer_name_or_path", folder)
    assert "\n" not in str(caught.value)


def test_the_help_names_every_form_of_data(capsys):
    with pytest.raises(SystemExit):
        main(["check-data", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for form in ("JSONL", "JSON array", ".gz", ".zst", "ShareGPT", "Alpaca"):
        assert form in shown
