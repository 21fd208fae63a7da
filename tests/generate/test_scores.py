"""Exact match, F1 per word and per character, answers that never ended, and the CSV of differing answers."""

from __future__ import annotations

import csv
import json
import re

import pytest

from hynb.errors import DataError
from hynb.generate.answer import make_answer
from hynb.generate.scores import f1, score, write_differences


@pytest.mark.parametrize(
    ("given", "expected", "value"),
    [
        ("a red car", "a red car", 1.0),
        ("a blue car", "a red car", 2 / 3),
        ("car car", "car", 2 / 3),
        ("red", "blue", 0.0),
        ("", "", 1.0),
        ("", "red", 0.0),
        # Four of five characters each way; per word nothing would agree.
        ("宝马x5、", "宝马x5，", 0.8),
        ("北京 x7", "北京x7", 1.0),
    ],
)
def test_f1(given, expected, value):
    assert f1(given, expected) == pytest.approx(value) == f1(expected, given)


def test_thoughts_do_not_count_and_unended_answers_are_counted():
    given = [make_answer("<think>a</think>2", ended=True), make_answer("<think>…", ended=False)]
    found = score(given, [make_answer("2", ended=True), make_answer("3", ended=True)])
    assert (found.exact_match, found.f1, found.never_ended, found.questions) == (0.5, 0.5, 1, 2)
    assert str(found) == "exact match 50.0%, F1 0.500, 1 of 2 answers never ended"


def test_the_csv_has_the_questions_whose_answers_differ(tmp_path):
    def all_of(*texts: str):
        return [make_answer(text, ended=text != "cut") for text in texts]

    questions = [(f"data.jsonl:{number}", f"q{number}") for number in (1, 2, 3)]
    given = {"base": all_of("1", "cut", "<think>t</think>x"), "adapter": all_of("1", "2", "x")}
    path = tmp_path / "differences.csv"
    assert write_differences(path, questions, all_of("1", "2", "3"), given) == 2
    rows = list(csv.DictReader(path.open(encoding="utf-8-sig", newline="")))
    assert [row["source"] for row in rows] == ["data.jsonl:2", "data.jsonl:3"]
    assert (rows[0]["base"], rows[0]["adapter"], rows[0]["expected"]) == ("cut", "2", "2")
    assert (rows[0]["base ended"], rows[0]["adapter ended"], rows[1]["thought of base"]) == ("no", "yes", "t")
    with pytest.raises(DataError, match="cannot be written"):
        write_differences(tmp_path / "no" / "folder.csv", questions, all_of("1", "2", "3"), given)


def test_the_rows_of_upstreams_own_task(shared):
    """Names of car series in an article, or none ("无"); A13B's rows have an empty thought and an <answer>."""
    lines = (shared / "models" / "hunyuan-a13b" / "example_nothink.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["messages"][-1]["content"] for line in lines]
    expected = [make_answer(text, ended=True) for text in texts]
    names = [re.fullmatch(r"<think>\s*</think>\s*<answer>\s*(.*?)\s*</answer>", text, re.DOTALL) for text in texts]
    assert [answer.text for answer in expected] == [name[1] for name in names if name]
    assert str(score(expected, expected)) == "exact match 100.0%, F1 1.000, 0 of 50 answers never ended"
    nothing = score([make_answer("无", ended=True)] * 50, expected)
    assert 0 < nothing.exact_match == sum(text.endswith("<answer>\n无\n</answer>") for text in texts) / 50
    # As after an answer that was cut, which names no series.
    cut = score([make_answer(text[:9], ended=False) for text in texts], expected)
    assert (cut.exact_match, cut.f1, cut.never_ended) == (0.0, 0.0, 50)
