"""`hynb ask`: one question, a file with scores, several models, and mistakes in one line."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from tiny import exchange, tiny_model, write_lines

from hynb.cli import main
from hynb.generate import answers
from hynb.generate.generation import Question


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("other"), seed=1)


def greedy(model: Path, *texts: str):
    questions = [Question(messages=[{"role": "user", "content": text}]) for text in texts]
    return list(answers(model, questions, max_new_tokens=4))


def test_one_question(model, capsys):
    assert main(["ask", str(model), "hello", "--greedy", "--max_new_tokens=4"]) == 0
    shown = capsys.readouterr()
    (answer,) = greedy(model, "hello")
    assert shown.out.strip() == answer.text
    assert ("no end token within 4 tokens" in shown.err) == (not answer.ended)


def test_a_file_of_questions_is_scored_for_each_model(model, other, tmp_path, capsys):
    right, wrong = greedy(model, "hello", "and you?")
    data = write_lines(tmp_path / "held_out.jsonl", exchange("hello", right.text), exchange("and you?", "北京"))
    table = tmp_path / "differences.csv"
    words = ["--questions", str(data), "--compare", str(other), "--differences", str(table)]
    assert main(["ask", str(model), *words, "--greedy", "--max_new_tokens=4", "--batch_size=2"]) == 0
    out = capsys.readouterr().out
    for folder in (model, other):
        assert out.count(f"== {folder}\n") == 1
        assert len(re.findall(rf"^{folder} +exact match [\d.]+%, F1 [\d.]+, \d of 2", out, re.MULTILINE)) == 1
    assert re.search(rf"^{model} +exact match 50\.0%", out, re.MULTILINE), out
    rows = list(csv.DictReader(table.open(encoding="utf-8-sig", newline="")))
    assert rows[-1]["source"].endswith("held_out.jsonl:2") and rows[-1][str(model)] == wrong.text
    assert f"{len(rows)} of 2 questions with answers that differ" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one question"),
        (["hello", "--questions", "data.jsonl"], "give one question"),
        (["hello", "--max_new_tokens=0"], "--max_new_tokens 0: must be at least 1"),
        (["hello", "--differences", "a.csv"], "--differences: needs --questions"),
        (["hello", "--tools", "nothing.json"], "--tools nothing.json: cannot be read"),
        (["hello", "--reasoning_effort", "high"], "reasoning_effort: the chat template of"),
        (["hello", "--compare", "/no/such"], "/no/such: there is no such folder"),
        (["--questions", "nothing.jsonl"], "there is no such file"),
    ],
)
def test_a_mistake_is_one_line(model, words, message, capsys):
    assert main(["ask", str(model), *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
