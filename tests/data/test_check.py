"""Files of every format, the check before training, previews, and ten thousand mutated lines."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
from pathlib import Path

import pytest
import zstandard
from tiny import tiny_data
from transformers import AutoTokenizer

from hynb.config import Config
from hynb.data import (
    IGNORED,
    ChatDataset,
    Conversation,
    LabelOptions,
    as_html,
    as_text,
    check_data,
    encode,
    find_files,
    read_conversations,
    split_share,
)
from hynb.data.command import add_arguments, run
from hynb.data.files import data_hash, parse_line
from hynb.demo.pretrain import write_tokenizer
from hynb.errors import DataError
from hynb.runs import RunDir

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, vocab_size=700, samples=500)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def write(path, *records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def sample(question, answer="a"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [ASK, ANSWER]),
        (
            {"system": "s", "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
            [{"role": "system", "content": "s"}, ASK, ANSWER],
        ),
        ({"instruction": "q", "output": "a"}, [ASK, ANSWER]),
        ({"instruction": "x", "input": "y", "output": "a"}, [ASK | {"content": "x\ny"}, ANSWER]),
        (
            {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["q", "a"]]},
            [{"role": "system", "content": "s"}, ASK, ANSWER, ASK, ANSWER],
        ),
    ],
)
def test_other_formats_are_converted(record, expected):
    assert parse_line(json.dumps(record).encode(), "f:1").messages == expected


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": [{"from": "tool", "value": "q"}]}, "turn 1: from 'tool' is unknown"),
        ({"conversations": [3]}, "turn 1: must be"),
        ({"conversations": []}, "must be"),
        ({"instruction": ["q"], "output": "a"}, "instruction must be text, not list"),
        ({"instruction": "q", "output": "a", "history": 1}, "history must be a list"),
        ({"instruction": "q", "output": ""}, "answer is empty"),
        ({"messages": [ASK, ANSWER | {"train": "no"}]}, "train must be true or false"),
        ({"messages": [ASK, ANSWER | {"train": False}]}, 'every answer has "train": false'),
    ],
)
def test_mistakes_in_other_formats_are_named(record, message):
    with pytest.raises(DataError) as caught:
        parse_line(json.dumps(record).encode(), "f:1")
    assert str(caught.value).startswith("f:1: ") and message in str(caught.value)


def test_compressed_files_globs_and_byte_order_marks_are_read_alike(tmp_path, tokenizer):
    plain = tiny_data(tmp_path / "a.jsonl", 8)
    content = plain.read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    # Two frames in one file, as parallel compressors write them.
    compressor, half = zstandard.ZstdCompressor(), content.index(b"\n", len(content) // 2) + 1
    (tmp_path / "c.jsonl.zst").write_bytes(compressor.compress(content[:half]) + compressor.compress(content[half:]))
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    expected = [conversation.messages for conversation in read_conversations(plain)]
    for name in ("b.jsonl.gz", "c.jsonl.zst", "d.jsonl"):
        path = tmp_path / name
        assert [item.messages for item in read_conversations(path)] == expected
        dataset = ChatDataset(path, tokenizer, 500)
        assert [dataset.conversation(index).messages for index in range(len(dataset))] == expected
        assert dataset.conversation(3).source == f"{path}:4"
    everything = ChatDataset(f"{tmp_path}/*.jsonl*", tokenizer, 500)
    assert len(everything) == 32 and everything.location(8) == f"{tmp_path / 'b.jsonl.gz'}:1"
    assert len(find_files([plain, f"{tmp_path}/*.jsonl"])) == 2
    assert len(find_files(f"{plain},{tmp_path / 'd.jsonl'}")) == 2
    assert data_hash(plain) == data_hash([plain]) != data_hash([plain, tmp_path / "d.jsonl"])


def test_a_damaged_compressed_file_is_named(tmp_path):
    lines = json.dumps(sample("q")).encode() * 1000
    whole = gzip.compress(lines)
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 0xFF
    for name, content, message in [
        ("cut.jsonl.gz", whole[:-20], "truncated"),
        ("damaged.jsonl.gz", damaged, "cannot be"),
        ("no.jsonl.gz", b"text", "cannot be read"),
        ("no.jsonl.zst", b"not zstd", "cannot be decompressed"),
    ]:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{re.escape(str(path))}: .*{message}"):
            list(read_conversations(path))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_truncated_compressed_file_is_never_taken_for_a_shorter_one(tmp_path, suffix):
    content = tiny_data(tmp_path / "a.jsonl", 200).read_bytes()
    compressed = {"gz": gzip.compress(content), "zst": zstandard.ZstdCompressor().compress(content) * 2}[suffix]
    for cut in (1, 5, len(compressed) // 3, len(compressed) - 20):
        path = tmp_path / f"cut{cut}.jsonl.{suffix}"
        path.write_bytes(compressed[:-cut])
        with pytest.raises(DataError, match=f"{path.name}: the compressed file is truncated"):
            check_data(path, on_bad_sample="skip", cache=False)


def test_missing_files_are_named_together(tmp_path):
    with pytest.raises(DataError) as caught:
        find_files([tmp_path, tmp_path / "none.jsonl", f"{tmp_path}/*.x"])
    assert len(caught.value.problems) == 3
    for text, problem in zip(["is a folder", "no such", "pattern"], caught.value.problems, strict=True):
        assert text in problem


def test_train_false_and_train_on_prompt(tokenizer):
    messages = [ASK, ANSWER | {"train": False}, ASK, ANSWER]
    conversation = Conversation(messages=messages, source="x")
    plain = encode(Conversation(messages=[ASK, ANSWER, ASK, ANSWER], source="x"), tokenizer, 99)
    off = encode(conversation, tokenizer, 99)
    trained = [index for index, label in enumerate(plain["labels"]) if label != IGNORED]
    assert off["input_ids"] == plain["input_ids"] and len(trained) == 4
    assert [index for index, label in enumerate(off["labels"]) if label != IGNORED] == trained[2:]
    on_prompt = LabelOptions(train_on_prompt=True)
    whole = encode(Conversation(messages=[ASK, ANSWER], source="x"), tokenizer, 99, on_prompt)
    assert whole["labels"] == whole["input_ids"]
    off = encode(conversation, tokenizer, 99, on_prompt)
    assert [index for index, label in enumerate(off["labels"]) if label == IGNORED] == [trained[0] - 1, *trained[:2]]


def test_text_that_spells_a_special_token_becomes_it_if_allowed(tokenizer):
    conversation = Conversation(messages=[ASK | {"content": "a<|eos|>b"}, ANSWER], source="x")
    eos = tokenizer.convert_tokens_to_ids("<|eos|>")
    assert encode(conversation, tokenizer, 99)["input_ids"].count(eos) == 1
    allowed = LabelOptions(allow_special_tokens_in_text=True)
    assert encode(conversation, tokenizer, 99, allowed)["input_ids"].count(eos) == 2
    assert encode(conversation, tokenizer, 99)["input_ids"].count(eos) == 1


def test_an_earlier_answer_may_end_differently_from_the_last(tokenizer):
    """`<|eos|>` ends both; the last is followed by `<|endoftext|>`, the earlier one by `<|extra_1|>`."""
    saved = tokenizer.chat_template
    ends = "{{ '<|eos|>' + ('<|endoftext|>' if loop.last else '<|extra_1|>') }}"
    tokenizer.chat_template = saved.replace("{{ message['content'] + '<|eos|>' }}", "{{ message['content'] }}" + ends)
    messages = [ASK, ANSWER, ASK, ANSWER]
    try:
        encoded = encode(Conversation(messages=messages, source="x"), tokenizer, 99)
        assert tokenizer.decode(encoded["input_ids"]) == tokenizer.apply_chat_template(messages, tokenize=False)
    finally:
        tokenizer.chat_template = saved
    trained = [label for label in encoded["labels"] if label != IGNORED]
    assert tokenizer.decode(trained) == "a<|eos|>a<|eos|><|endoftext|>"


def test_a_template_that_strips_contents_is_followed(tokenizer):
    saved = tokenizer.chat_template
    tokenizer.chat_template = saved.replace("message['content']", "message['content'] | trim")
    messages = [ASK | {"content": " q\n"}, ANSWER | {"content": "\ta "}]
    try:
        ids = encode(Conversation(messages=messages, source="x"), tokenizer, 99)["input_ids"]
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(ids) == "<|startoftext|>q<|extra_0|>a<|eos|>"
    finally:
        tokenizer.chat_template = saved


def test_a_template_that_rewrites_an_answer_is_found(tokenizer, tmp_path):
    """Templates of reasoning models remove the thoughts of earlier answers: training would silently lose them."""
    saved = tokenizer.chat_template
    tokenizer.chat_template = saved.replace(
        "{{ message['content'] + '<|eos|>' }}", "{{ message['content'].split('</think>')[-1] + '<|eos|>' }}"
    )
    path = write(tmp_path / "a.jsonl", *[sample(f"{n}") for n in range(200)], sample("q", "<think>x</think>y"))
    try:
        report = check_data(path, tokenizer, 99, on_bad_sample="skip")
    finally:
        tokenizer.chat_template = saved
    assert report.rejected_locations == [f"{path}:201"] and "<think>" in report.rejected[0].problem
    assert check_data(path, tokenizer, 99).samples == 201


def test_the_report_counts_everything(tokenizer, tmp_path):
    good = [sample("x " * n, "y " * n) for n in (3, 30, 60)]
    records = [*good, good[0], sample("a<|eos|>b"), sample("x " * 500), {"messages": 3}, good[1]]
    path = write(tmp_path / "a.jsonl", *records)
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


def test_a_runs_rejected_lines_are_those_of_its_last_check(tokenizer, tmp_path):
    from hynb.train import check_datasets

    path = write(tmp_path / "a.jsonl", sample("q"), {"messages": 3})
    config = Config(train_data_file=str(path), output_dir=str(tmp_path / "run"), on_bad_sample="skip")
    kept = RunDir(config.output_dir).rejected
    assert check_datasets(config, tokenizer).summary["data_rejected"] == 1
    assert len(kept.read_text().splitlines()) == 1
    # The data is fixed before the run is resumed.
    write(path, sample("q"), sample("r"))
    assert check_datasets(config, tokenizer).summary["data_rejected"] == 0
    assert not kept.exists()


def test_processes_and_cache_change_nothing(tokenizer, tmp_path, monkeypatch):
    path = tiny_data(tmp_path / "a.jsonl", 150)
    path.write_text(path.read_text() + "broken\n" + json.dumps(sample("q")) + "\n", encoding="utf-8")
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


def test_previews_mark_trained_tokens_by_colour_and_by_brackets(tokenizer):
    messages = [ASK | {"content": "<b>&车系"}, ANSWER | {"content": "奥迪 A4"}]
    conversation = Conversation(messages=messages, source="f:1")
    encoded = encode(conversation, tokenizer, 99)
    text = as_text(conversation, tokenizer, 99)
    assert text == "<|startoftext|><b>&车系<|extra_0|>⟦奥迪 A4<|eos|>⟧"
    coloured = as_text(conversation, tokenizer, 99, colour=True)
    assert re.sub("\x1b\\[[0-9;]*m", "", coloured) == text and "\x1b[1;34m" in coloured
    page = as_html(conversation, tokenizer, 99)
    assert "<b>" not in page and page.count("⟦") == page.count("⟧") == 2
    shown = [int(number) for ids in re.findall(r'title="([\d ]+) · ', page) for number in ids.split()]
    assert shown == encoded["input_ids"]
    cut = len(encoded["input_ids"]) - 2
    assert "line-through" in as_html(conversation, tokenizer, cut)
    assert re.findall(r'title="([\d ]+) · cut', as_html(conversation, tokenizer, cut))
    assert "2 tokens are cut" in as_text(conversation, tokenizer, cut)


def test_a_held_out_fraction_depends_only_on_the_seed(tmp_path, tokenizer):
    train, held = split_share(100, 0.1, 3)
    assert len(held) == 10 and sorted(train + held) == list(range(100))
    assert (train, held) == split_share(100, 0.1, 3) != split_share(100, 0.1, 4)
    assert [len(part) for part in split_share(2, 0.99, 0)] == [1, 1]
    for count, share in [(10, 0.0), (10, 1.5), (1, 0.5)]:
        with pytest.raises(DataError, match="eval_split"):
            split_share(count, share, 0)
    path = tiny_data(tmp_path / "a.jsonl", 10)
    part = ChatDataset(path, tokenizer, 99).subset([7, 2])
    assert [part.location(0), part.location(1)] == [f"{path}:8", f"{path}:3"] and len(part) == 2


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
    path = write(tmp_path / "long.jsonl", sample("q", long), {"messages": long}, sample("q"))
    report = check_data(path, on_bad_sample="skip", cache=False)
    assert report.rejected_locations == [f"{path}:2"] and report.samples == 2
    assert len(report.problems()[0]) < 500
    # This tokenizer takes seconds per megabyte: a shorter string.
    path = write(tmp_path / "long.jsonl", sample("q", long[:300_000]), sample(long[:300_000]), sample("q"))
    report = check_data(path, tokenizer, 100, on_bad_sample="skip", cache=False)
    assert report.rejected_locations == [f"{path}:2"] and report.samples == 2
    assert report.cut_answer_tokens > 100_000
