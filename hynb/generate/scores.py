"""How well answers agree with those in the data: exact match and F1, and the answers in which models differ."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hynb.errors import DataError
from hynb.generate.answer import Answer

# Chinese characters, kana and hangul, which are written without spaces between words or with few.
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")


@dataclass(kw_only=True, frozen=True)
class Scores:
    """A model's answers against those in the data; thoughts are not compared.

    Args:
        exact_match: fraction of answers that are equal.
        f1: mean F1 of the answers' units (SQuAD's measure, arXiv 1606.05250, without its normalisation).
        never_ended: number of answers without an end token.
    """

    questions: int
    exact_match: float
    f1: float
    never_ended: int

    def __str__(self) -> str:
        return (
            f"exact match {self.exact_match:.1%}, F1 {self.f1:.3f}, {self.never_ended} of {self.questions} answers "
            "never ended"
        )


def score(given: Sequence[Answer], expected: Sequence[Answer]) -> Scores:
    """The scores of a model's answers.

    Args:
        given, expected: equally many, at least one.
    """
    pairs = list(zip(given, expected, strict=True))
    return Scores(
        questions=len(pairs),
        exact_match=sum(answer.text == right.text for answer, right in pairs) / len(pairs),
        f1=sum(f1(answer.text, right.text) for answer, right in pairs) / len(pairs),
        never_ended=sum(not answer.ended for answer in given),
    )


def f1(given: str, expected: str) -> float:
    """Harmonic mean of precision and recall of an answer's units.

    The units are characters without white space if one of the texts has Chinese, Japanese or Korean ones, else words.
    """
    by_character = bool(_CJK.search(given + expected))
    ones, others = ([*"".join(text.split())] if by_character else text.split() for text in (given, expected))
    if not ones or not others:
        return float(ones == others)
    common = (Counter(ones) & Counter(others)).total()
    return 2 * common / (len(ones) + len(others))


def write_differences(
    path: Path,
    questions: Sequence[tuple[str, str]],
    expected: Sequence[Answer],
    given: Mapping[str, Sequence[Answer]],
) -> int:
    """Writes a CSV of the questions whose answers are not all equal, and returns their number.

    Args:
        questions: location and text of each.
        given: each model's answers by the name of its column.

    Raises:
        DataError: the file cannot be written.
    """
    rows = []
    for index, (source, text) in enumerate(questions):
        answers = [found[index] for found in given.values()]
        texts = [answer.text for answer in answers]
        if set(texts) != {expected[index].text}:
            ended = ["yes" if answer.ended else "no" for answer in answers]
            thoughts = [answer.thought for answer in answers]
            rows.append([source, text, expected[index].text, *texts, *thoughts, *ended])
    columns = [*given, *(f"thought of {name}" for name in given), *(f"{name} ended" for name in given)]
    try:
        # With a byte order mark, by which spreadsheets recognise UTF-8.
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows([["source", "question", "expected", *columns], *rows])
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None
    return len(rows)
