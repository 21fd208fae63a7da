"""The check before training: every line is used or named, in one process, in several, and from the cache."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import pytest
from tiny import exchange, tiny_data, write_lines

from hynb.cli import main
from hynb.data import IGNORED, ChatDataset, LabelOptions, check_data
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


def test_samples_that_are_too_long_are_left_out_and_counted_up_to_a_share(tokenizer, tmp_path):
    """Also where invalid lines stop the run: upstream's data has such samples, and they are not invalid."""
    long, longer = (exchange("x " * count) for count in (500, 600))
    path = write_lines(tmp_path / "a.jsonl", *[exchange(f"{n}") for n in range(38)], long, longer)
    rejected_path = tmp_path / "rejected.jsonl"
    report = check_data(path, tokenizer, 64, rejected_path=rejected_path)
    assert (report.samples, len(report.too_long), report.invalid) == (38, 2, [])
    assert report.rejected_locations == [f"{path}:39", f"{path}:40"]
    needed = report.too_long[1].needed_tokens
    assert "2 samples (5.0%), since nothing of their answers is left within max_seq_length = 64" in report.text()
    assert f"max_seq_length = {needed} leaves none out" in report.text()
    assert check_data(path, tokenizer, needed).samples == 40
    assert check_data(path, tokenizer, needed - 1).samples == 39
    written = [json.loads(line) for line in rejected_path.read_text().splitlines()]
    assert [item["source"] for item in written] == report.rejected_locations
    assert f"from {needed} tokens on it is trained on" in written[1]["problem"]
    with pytest.raises(
        DataError, match=rf"2 samples \(5.0%\).* max_seq_length = {needed} leaves none out. Raise max_seq_len"
    ):
        check_data(path, tokenizer, 64, max_cut_share=0.04)


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
        report = check_data(path, tokenizer, 99, on_bad_sample="skip", max_cut_share=1)
    finally:
        tokenizer.chat_template = saved
    assert report.rejected_locations == [f"{path}:201"] and "<think>" in report.rejected[0].problem
    assert check_data(path, tokenizer, 99).samples == 201


def test_the_report_counts_everything(tokenizer, tmp_path):
    good = [exchange("x " * n, "y " * n) for n in (3, 30, 60)]
    records = [*good, good[0], exchange("a<|eos|>b"), exchange("x " * 500), {"messages": 3}, good[1]]
    path = write_lines(tmp_path / "a.jsonl", *records)
    rejected_path = tmp_path / "run" / "rejected.jsonl"
    report = check_data(path, tokenizer, 200, on_bad_sample="skip", max_cut_share=1, rejected_path=rejected_path)
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
    for part in ("8 lines = 6 samples + 2 rejected", f"{path}:7: must be", "duplicates: 2", "added tokens: 1"):
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
    assert len(caught.value.problems) == 1


def test_processes_and_cache_change_nothing(tokenizer, tmp_path, monkeypatch):
    path = tiny_data(tmp_path / "a.jsonl", 150)
    path.write_text(path.read_text() + "broken\n" + json.dumps(exchange("q")) + "\n", encoding="utf-8")
    monkeypatch.setattr("hynb.data.scan._RANGE_BYTES", 5000)
    seen = []
    alone = check_data(path, tokenizer, 60, on_bad_sample="skip", max_cut_share=1, processes=1, cache=False)
    several = check_data(
        path,
        tokenizer,
        60,
        on_bad_sample="skip",
        max_cut_share=1,
        processes=2,
        progress=lambda *p: seen.append(p),
        cache=False,
    )
    assert len(seen) > 3 and seen[-1][0] == seen[-1][1] and sorted(seen) == seen
    stored = check_data(path, tokenizer, 60, on_bad_sample="skip", max_cut_share=1)
    again = check_data(path, tokenizer, 60, on_bad_sample="skip", max_cut_share=1)
    assert again.from_cache and not stored.from_cache
    (cached,) = (file for file in (Path(os.environ["XDG_CACHE_HOME"]) / "hynb").iterdir() if file.suffix == ".npz")
    cached.write_bytes(cached.read_bytes()[:-100])
    repeated = check_data(path, tokenizer, 60, on_bad_sample="skip", max_cut_share=1)
    assert not repeated.from_cache
    for report in (several, stored, again, repeated):
        assert report.text() == alone.text() and report.rejected == alone.rejected
        assert report.kept.tolist() == alone.kept.tolist()
        assert report.line_indices.tolist() == alone.line_indices.tolist()
    assert not check_data(path, tokenizer, 61, on_bad_sample="skip", max_cut_share=1).from_cache
    path.write_text(path.read_text().replace("broken", "brokem"))
    assert not check_data(path, tokenizer, 60, on_bad_sample="skip", max_cut_share=1).from_cache


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
    report = check_data(path, tokenizer, 200, on_bad_sample="skip", max_cut_share=1, cache=False)
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
    report = check_data(path, on_bad_sample="skip", max_cut_share=1, cache=False)
    assert report.rejected_locations == [f"{path}:2"] and report.samples == 2
    assert len(report.problems()[0]) < 500
    # This tokenizer takes seconds per megabyte: a shorter string.
    path = write_lines(
        tmp_path / "long.jsonl", exchange("q", long[:300_000]), exchange(long[:300_000]), exchange("q")
    )
    report = check_data(path, tokenizer, 100, on_bad_sample="skip", max_cut_share=1, cache=False)
    assert report.rejected_locations == [f"{path}:2"] and report.samples == 2
    assert report.cut_answer_tokens > 100_000


def test_keys_that_nothing_reads_are_listed_once_with_their_number(tokenizer, tmp_path):
    records = [exchange(f"{n}") | ({"id": n, "topic": "cars"} if n < 3 else {"id": n}) for n in range(5)]
    report = check_data(write_lines(tmp_path / "a.jsonl", *records), tokenizer, 99)
    assert report.unknown_keys == {"id": 5, "topic": 3} and report.samples == 5
    assert "keys that nothing reads: id (5 samples), topic (3 samples)" in report.text()
    assert report.duplicate_count == 0


def test_ignored_fields_are_refused_or_counted(tokenizer, tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    path = write_lines(tmp_path / "a.jsonl", exchange("a"), exchange("b") | {"tools": tools})
    with pytest.raises(DataError, match=rf"{path}:2: the chat template does not render tools, so"):
        check_data(path, tokenizer, 99)
    options = LabelOptions(allow_ignored_fields=True)
    report = check_data(path, tokenizer, 99, options=options)
    assert report.ignored_fields == {"tools": 1} and report.samples == 2
    assert "fields that the chat template does not render: tools (1 samples)" in report.text()


def test_split_turns_makes_one_sample_per_answer(tokenizer, tmp_path):
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"text {n}"} for n in range(6)]
    off = [*turns[:3], turns[3] | {"train": False}, *turns[4:]]
    path = write_lines(tmp_path / "a.jsonl", {"messages": turns}, exchange("q"), {"messages": off}, {"messages": 3})
    options = LabelOptions(split_turns=True)
    report = check_data(path, tokenizer, 99, options=options, on_bad_sample="skip")
    assert (report.lines, report.samples, len(report.invalid)) == (4, 3 + 1 + 2, 1)
    assert report.answers.tolist() == [1, 2, 3, 1, 1, 3] and report.line_indices.tolist() == [0, 0, 0, 1, 2, 2]
    assert report.rejected_locations == [f"{path}:4"]
    dataset = ChatDataset(path, tokenizer, 99, options=options, rejected=report.rejected_locations)
    samples = dataset.with_answers(report.line_indices.tolist(), report.answers.tolist())
    trained = [tokenizer.decode([label for label in sample["labels"] if label != IGNORED]) for sample in samples]
    assert trained == [f"{text}<|eos|>" for text in ("text 1", "text 3", "text 5", "a", "text 1", "text 5")]
    assert tokenizer.decode(samples[1]["input_ids"]) == tokenizer.apply_chat_template(turns[:4], tokenize=False)
    assert [len(sample["input_ids"]) for sample in samples] == report.lengths.tolist()


def test_the_tokenised_samples_are_written_for_comparison(tokenizer, tmp_path, capsys):
    path = write_lines(tmp_path / "a.jsonl", exchange("q"), exchange("x " * 90), exchange("r"))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "out.jsonl"
    command = ["check-data", str(path), "--tokenizer_name_or_path", str(tmp_path / "tokenizer")]
    command += ["--max_seq_length", "50", "--max_cut_share", "0.5", "--tokenised", str(out)]
    assert main(command) == 0
    assert "2 tokenised samples are in" in capsys.readouterr().out
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [item["source"] for item in written] == [f"{path}:1", f"{path}:3"]
    dataset = ChatDataset(path, tokenizer, 50)
    for item, index in zip(written, (0, 2), strict=True):
        assert {name: item[name] for name in ("input_ids", "labels")} == dataset[index]
    write_lines(path, exchange("q"), {"messages": [*exchange("q")["messages"], *exchange("r")["messages"]]})
    assert main([*command, "--split_turns"]) == 0
    written = [json.loads(line) for line in out.read_text().splitlines()]
    expected = [(f"{path}:1", 1), (f"{path}:2", 1), (f"{path}:2", 2)]
    assert [(item["source"], item["answer"]) for item in written] == expected


def test_a_record_is_refused_once_however_many_answers_it_has(tokenizer, tmp_path, monkeypatch):
    stripping = tokenizer.chat_template.replace("message['content']", "message['content'].split('</think>')[-1]")
    monkeypatch.setattr(tokenizer, "chat_template", stripping)
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"text {n}"} for n in range(8)]
    broken = [*turns[:3], turns[3] | {"content": "<think>t</think>text 3"}, *turns[4:]]
    path = write_lines(tmp_path / "a.jsonl", {"messages": turns}, {"messages": broken})
    rejected_path = tmp_path / "rejected.jsonl"
    options = LabelOptions(split_turns=True)
    found = {"options": options, "on_bad_sample": "skip", "rejected_path": rejected_path}
    report = check_data(path, tokenizer, 99, **found)
    assert len(report.invalid) == 1 and report.problems()[0].startswith(f"{path}:2: the chat template changes")
    assert len(rejected_path.read_text().splitlines()) == 1
    assert report.answers.tolist() == [1, 2, 3, 4, 1]
    assert "2 lines, 1 of them rejected or without one of their answers; 5 samples, one for each" in report.text()
    # Answers that are too long: one entry with their number, and the length that leaves none out.
    path = write_lines(tmp_path / "b.jsonl", {"messages": turns}, exchange("q"))
    needed = check_data(path, tokenizer, 99, options=options).lengths.tolist()
    report = check_data(path, tokenizer, needed[1], **(found | {"max_cut_share": 1}))
    assert len(report.too_long) == 1 and report.too_long[0].samples == 2 and report.samples == 3
    assert report.too_long_share == 2 / 5 and "2 samples (40.0%)" in report.text()
    longest = report.too_long[0].needed_tokens
    problem = json.loads(rejected_path.read_text())["problem"]
    assert "nothing of answer 3 is left" in problem and problem.endswith(f"with answer 4, up to {longest} tokens")
    kept = check_data(path, tokenizer, report.too_long[0].needed_tokens, options=options)
    assert kept.samples == 5


@pytest.mark.parametrize("processes", [1, 2])
def test_a_template_that_ends_no_answer_is_refused_once_by_its_folder(tokenizer, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template.replace("+ '<|eos|>'", ""))
    monkeypatch.setattr("hynb.data.scan._RANGE_BYTES", 5000)
    path = tiny_data(tmp_path / "a.jsonl", 300)
    seen = []
    for on_bad_sample in ("stop", "skip", "report"):
        with pytest.raises(DataError) as caught:
            check_data(
                path,
                tokenizer,
                99,
                on_bad_sample=on_bad_sample,
                processes=processes,
                progress=lambda done, total: seen.append(done),
                cache=False,
            )
        (problem,) = caught.value.problems
        assert problem.startswith(f"{tokenizer.name_or_path}: its chat template writes no end token")
        assert f"{path}:1;" in problem
    assert not seen


def test_a_time_that_the_template_writes_is_reported_and_is_the_records_own(tokenizer, tmp_path, monkeypatch):
    plain = tokenizer.chat_template
    dated = "{{ strftime_now('%d.%m.%Y %H:%M') }}" + plain
    monkeypatch.setattr(tokenizer, "chat_template", dated)
    path = write_lines(tmp_path / "a.jsonl", exchange("q"), exchange("q") | {"current_time": "2024-02-29 08:30"})
    report = check_data(path, tokenizer, 99)
    assert f"samples have {report.written_time}, so" in report.text() and not report.unknown_keys
    dataset = ChatDataset(path, tokenizer, 99)
    year, month, day = report.written_time[:10].split("-")
    texts = [tokenizer.decode(dataset[index]["input_ids"]) for index in range(2)]
    assert texts[0].startswith(f"{day}.{month}.{year} ") and texts[1].startswith("29.02.2024 08:30<")
    # A template that writes the time elsewhere, but not here.
    only = "{% if messages[0].role == 'system' %}{{ strftime_now('%Y') }}{% endif %}" + plain
    monkeypatch.setattr(tokenizer, "chat_template", only)
    assert "time:" not in check_data(write_lines(tmp_path / "b.jsonl", exchange("q")), tokenizer, 99).text()
    monkeypatch.setattr(tokenizer, "chat_template", dated)
    write_lines(path, exchange("q") | {"current_time": "yesterday"})
    with pytest.raises(DataError, match=rf"{path}:1: current_time = 'yesterday': must be a time such as"):
        check_data(path, tokenizer, 99)
