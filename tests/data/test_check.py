"""The check before training: every line is used or named, in one process, in several, and from the cache."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import pytest
from tiny import ANSWER, exchange, tiny_data, write_lines

from hynb.data import IGNORED, ChatDataset, check_data
from hynb.errors import DataError


def test_all_invalid_lines_of_a_file_are_counted(tokenizer, tmp_path):
    path = tiny_data(tmp_path / "train.jsonl", 10)
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join(["\ufeff" + lines[0], "", "x{", *lines[1:5], '{"messages": 3}']) + "\n", encoding="utf-8"
    )
    with pytest.raises(DataError) as caught:
        check_data(path, tokenizer, 512)
    assert [problem.split(" ")[0].rstrip(":") for problem in caught.value.problems] == [f"{path}:3:1", f"{path}:8"]
    with pytest.raises(DataError, match="30 of 30 lines are invalid; the first 20 are shown"):
        path.write_text("x\n" * 30)
        check_data(path, tokenizer, 512)
    path.write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        check_data(path, tokenizer, 512)


def test_a_sample_whose_answer_is_truncated_away_is_rejected(tokenizer, tmp_path):
    path = tmp_path / "long.jsonl"
    long = [{"role": "user", "content": "x " * 500}, ANSWER]
    path.write_text(json.dumps({"messages": long}) + "\n")
    with pytest.raises(DataError, match="nothing of the answer is left within max_seq_length = 64"):
        check_data(path, tokenizer, 64)
    assert check_data(path, tokenizer, 5000).samples == 1


def test_a_template_that_rewrites_an_answer_is_found(tokenizer, tmp_path):
    """Templates of reasoning models remove the thoughts of earlier answers: training would silently lose them."""
    saved = tokenizer.chat_template
    tokenizer.chat_template = saved.replace(
        "{{ message['content'] + '<|eos|>' }}", "{{ message['content'].split('</think>')[-1] + '<|eos|>' }}"
    )
    path = write_lines(
        tmp_path / "a.jsonl", *[exchange(f"{n}") for n in range(200)], exchange("q", "<think>x</think>y")
    )
    try:
        report = check_data(path, tokenizer, 99, on_bad_sample="skip")
    finally:
        tokenizer.chat_template = saved
    assert report.rejected_locations == [f"{path}:201"] and "<think>" in report.rejected[0].problem
    assert check_data(path, tokenizer, 99).samples == 201


def test_the_report_counts_everything(tokenizer, tmp_path):
    good = [exchange("x " * n, "y " * n) for n in (3, 30, 60)]
    records = [*good, good[0], exchange("a<|eos|>b"), exchange("x " * 500), {"messages": 3}, good[1]]
    path = write_lines(tmp_path / "a.jsonl", *records)
    rejected_path = tmp_path / "run" / "rejected.jsonl"
    report = check_data(path, tokenizer, 200, on_bad_sample="skip", rejected_path=rejected_path)
    assert (report.lines, report.samples, len(report.rejected)) == (8, 6, 2)
    assert report.rejected_locations == [f"{path}:6", f"{path}:7"]
    written = [json.loads(line) for line in rejected_path.read_text().splitlines()]
    assert [item["source"] for item in written] == report.rejected_locations
    assert json.loads(written[1]["line"]) == {"messages": 3} and "must be" in written[1]["problem"]
    assert report.duplicate_count == 2
    assert report.duplicates == [(f"{path}:4", f"{path}:1"), (f"{path}:8", f"{path}:2")] or sorted(
        report.duplicates
    ) == [(f"{path}:4", f"{path}:1"), (f"{path}:8", f"{path}:2")]
    assert report.spelled_locations == [f"{path}:5"]
    dataset = ChatDataset(path, tokenizer, 200, rejected=report.rejected_locations)
    whole = ChatDataset(path, tokenizer, 10**6, rejected=report.rejected_locations)
    assert len(dataset) == report.samples
    for index in range(len(dataset)):
        assert report.kept[index] == len(dataset[index]["input_ids"])
        assert report.lengths[index] == len(whole[index]["input_ids"])
        assert report.trained_kept[index] == sum(label != IGNORED for label in dataset[index]["labels"])
        assert report.trained[index] == sum(label != IGNORED for label in whole[index]["labels"])
    assert report.cut_samples == 1 and report.cut_answer_tokens > 0
    text = report.text(batch_size=2)
    for part in ("8 lines = 6 samples + 2 rejected", f"{path}:7: must be", "duplicates: 2", "special tokens: 1"):
        assert part in text
    assert f"  {path}:4 repeats {path}:1" in text and "truncated at max_seq_length = 200: 1 samples" in text
    assert "packing:" in text and "padding at per_device_train_batch_size = 2" in text and "█" in text
    # Batches of one sample have no padding.
    assert report.padding_waste(1) == 0 and 0 < report.padding_waste(6) < 1
    assert report.padding_waste(6) == pytest.approx(1 - report.kept.sum() / (report.kept.max() * 6))
    assert report.packing_gain(1) == 1
    assert 1 < report.packing_gain(6) <= 1 / (1 - report.padding_waste(6))
    assert "stays text" in text and "becomes the token" in report.text(special_tokens_allowed=True)
    with pytest.raises(DataError) as caught:
        check_data(path, tokenizer, 200)
    assert len(caught.value.problems) == 2


def test_processes_and_cache_change_nothing(tokenizer, tmp_path, monkeypatch):
    path = tiny_data(tmp_path / "a.jsonl", 150)
    path.write_text(path.read_text() + "broken\n" + json.dumps(exchange("q")) + "\n", encoding="utf-8")
    monkeypatch.setattr("hynb.data.scan._RANGE_BYTES", 5000)
    seen = []
    alone = check_data(path, tokenizer, 60, on_bad_sample="skip", processes=1, cache=False)
    several = check_data(
        path, tokenizer, 60, on_bad_sample="skip", processes=2, progress=lambda *p: seen.append(p), cache=False
    )
    assert len(seen) > 3 and seen[-1][0] == seen[-1][1] and sorted(seen) == seen
    stored = check_data(path, tokenizer, 60, on_bad_sample="skip")
    again = check_data(path, tokenizer, 60, on_bad_sample="skip")
    assert again.from_cache and not stored.from_cache
    (cached,) = (file for file in (Path(os.environ["XDG_CACHE_HOME"]) / "hynb").iterdir() if file.suffix == ".npz")
    cached.write_bytes(cached.read_bytes()[:-100])
    repeated = check_data(path, tokenizer, 60, on_bad_sample="skip")
    assert not repeated.from_cache
    for report in (several, stored, again, repeated):
        assert report.text() == alone.text() and report.rejected == alone.rejected
        assert report.kept.tolist() == alone.kept.tolist()
        assert report.line_indices.tolist() == alone.line_indices.tolist()
    assert not check_data(path, tokenizer, 61, on_bad_sample="skip").from_cache
    path.write_text(path.read_text().replace("broken", "brokem"))
    assert not check_data(path, tokenizer, 60, on_bad_sample="skip").from_cache


def mutated(rng, base):
    """One line, mutated; newlines are replaced so that it stays one line."""
    kind = rng.randrange(9)
    line = bytearray(rng.choice(base))
    if kind == 0:
        line = line[: rng.randrange(len(line))]
    elif kind == 1:
        line = bytearray(rng.randbytes(rng.randrange(1, 300)))
    elif kind == 2:
        depth = rng.choice([10, 900, 1100, 50_000])
        line = bytearray(b'{"messages":' + b"[" * depth + b"]" * depth + b"}")
    elif kind == 3:
        number = rng.choice([b"1e999", b"9" * 5000, b"-0", b"NaN", b"Infinity"])
        line = bytearray(b'{"messages":[{"role":"user","content":' + number + b"}]}")
    elif kind == 4:
        half = rng.choice([b"\\ud800", b"\\udfff", b"\\u0000", b"\\ud83d\\ude00", b"\xed\xa0\x80", b"\\uffff"])
        line = bytearray(line.replace(b'"content": "', b'"content": "' + half))
    elif kind == 5:
        record = json.loads(bytes(line))
        wrong = rng.choice([None, 1, 1.5, True, [], {}, "", [[]], {"a": 1}, "text"])
        place = rng.choice(["messages", "message", "role", "content", "extra"])
        if place == "messages":
            record["messages"] = wrong
        elif place == "message":
            record["messages"][rng.randrange(len(record["messages"]))] = wrong
        else:
            record["messages"][rng.randrange(len(record["messages"]))][place] = wrong
        line = bytearray(json.dumps(record).encode())
    elif kind == 6:
        for _ in range(rng.randint(1, 6)):
            line[rng.randrange(len(line))] = rng.randrange(256)
    elif kind == 7:
        record = json.loads(bytes(line))
        rng.shuffle(record["messages"])
        line = bytearray(json.dumps(record).encode())
    return bytes(line).replace(b"\n", b" ")


def test_ten_thousand_mutated_lines_are_used_or_named(tokenizer, tmp_path):
    rng = random.Random(11)
    base = tiny_data(tmp_path / "base.jsonl", 50).read_bytes().splitlines()
    mutations = [mutated(rng, base) for _ in range(10_000)]
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(b"\n".join(mutations) + b"\n")
    report = check_data(path, tokenizer, 200, on_bad_sample="skip", cache=False)
    not_blank = [number for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    assert report.lines == len(not_blank) == report.samples + len(report.rejected)
    assert report.samples > 1000 and len(report.rejected) > 1000
    dataset = ChatDataset(path, tokenizer, 200, rejected=report.rejected_locations)
    assert len(dataset) == report.samples
    for item in report.rejected:
        assert re.match(rf"{re.escape(str(path))}:\d+", item.problem) and len(item.problem) < 700
    for index in rng.sample(range(len(dataset)), 200):
        assert any(label != IGNORED for label in dataset[index]["labels"])


def test_a_string_of_ten_megabytes_is_handled(tokenizer, tmp_path):
    long = "ab 车 " * 1_700_000
    path = write_lines(tmp_path / "long.jsonl", exchange("q", long), {"messages": long}, exchange("q"))
    report = check_data(path, on_bad_sample="skip", cache=False)
    assert report.rejected_locations == [f"{path}:2"] and report.samples == 2
    assert len(report.problems()[0]) < 500
    # This tokenizer takes seconds per megabyte: a shorter string.
    path = write_lines(
        tmp_path / "long.jsonl", exchange("q", long[:300_000]), exchange(long[:300_000]), exchange("q")
    )
    report = check_data(path, tokenizer, 100, on_bad_sample="skip", cache=False)
    assert report.rejected_locations == [f"{path}:2"] and report.samples == 2
    assert report.cut_answer_tokens > 100_000
