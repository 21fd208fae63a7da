"""Files of every format: read, converted, or refused with file and line."""

from __future__ import annotations

import gzip
import json
import random
import re
import resource

import pytest
import zstandard
from tiny import ANSWER, QUESTION, exchange, tiny_data

from hynb.data import ChatDataset, check_data, find_files, read_conversations, split_share
from hynb.data.files import data_hash, open_data
from hynb.data.records import parse_line
from hynb.errors import DataError


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [QUESTION, ANSWER]),
        (
            {"system": "s", "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
            [{"role": "system", "content": "s"}, QUESTION, ANSWER],
        ),
        ({"instruction": "q", "output": "a"}, [QUESTION, ANSWER]),
        ({"instruction": "x", "input": "y", "output": "a"}, [QUESTION | {"content": "x\ny"}, ANSWER]),
        (
            {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["q", "a"]]},
            [{"role": "system", "content": "s"}, QUESTION, ANSWER, QUESTION, ANSWER],
        ),
    ],
)
def test_other_formats_are_converted(record, expected):
    assert parse_line(json.dumps(record).encode(), "f:1").messages == expected


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": [{"from": "robot", "value": "q"}]}, "turn 1: from 'robot' is unknown"),
        ({"conversations": [3]}, "turn 1: must be"),
        ({"conversations": []}, "must be"),
        ({"instruction": ["q"], "output": "a"}, "instruction must be text, not list"),
        ({"instruction": "q", "output": "a", "history": 1}, "history must be a list"),
        ({"instruction": "q", "output": ""}, "answer is empty"),
        ({"messages": [QUESTION, ANSWER | {"train": "no"}]}, "train must be true or false"),
        ({"messages": [QUESTION, ANSWER | {"train": False}]}, 'every answer has "train": false'),
    ],
)
def test_mistakes_in_other_formats_are_named(record, message):
    with pytest.raises(DataError) as caught:
        parse_line(json.dumps(record).encode(), "f:1")
    assert str(caught.value).startswith("f:1: ") and message in str(caught.value)


INVALID = [
    (b"{", "invalid JSON"),
    (b"[]", 'must be {"messages"'),
    (b"\xff\xfe", "invalid UTF-8 at byte 0"),
    (b"[" * 100_000, "JSON that cannot be read"),
    (b'{"messages": 1}', 'must be {"messages"'),
    (json.dumps({"messages": []}).encode(), "must be"),
    (json.dumps({"messages": [1]}).encode(), "message 1: must be"),
    (json.dumps({"messages": [{"role": "bot", "content": "x"}]}).encode(), "role 'bot' is unknown"),
    (json.dumps({"messages": [QUESTION]}).encode(), "there is no answer to train on"),
    (json.dumps({"messages": [ANSWER]}).encode(), "there is no message of the user"),
    (json.dumps({"messages": [QUESTION, QUESTION, ANSWER]}).encode(), "two messages of the user follow each other"),
    (json.dumps({"messages": [QUESTION, ANSWER, ANSWER]}).encode(), "message 3: the assistant's message follows"),
    (
        json.dumps({"messages": [{"role": "tool", "content": "r"}, ANSWER]}).encode(),
        "first message is the tool's",
    ),
    (json.dumps({"messages": [QUESTION, {"role": "assistant", "content": " "}]}).encode(), "answer is empty"),
    (json.dumps({"messages": [{"role": "user", "content": 3}, ANSWER]}).encode(), "must be text, and is 3"),
    (
        b'{"messages": [{"role": "user", "content": "q", "content": "r"}, {"role": "assistant", "content": "a"}]}',
        "twice",
    ),
    (b'{"output": "a", "instruction": "q", "output": "b"}', "'output' is given twice in one object"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}', "surrogate"),
]


@pytest.mark.parametrize(("line", "message"), INVALID)
def test_an_invalid_line_is_named(line, message):
    with pytest.raises(DataError) as caught:
        parse_line(line, "file.jsonl:7")
    assert str(caught.value).startswith("file.jsonl:7") and message in str(caught.value)


def test_mutated_lines_are_read_or_named():
    rng = random.Random(5)
    good = json.dumps({"messages": [QUESTION, ANSWER]}).encode()
    accepted = 0
    for _ in range(3000):
        line = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(line))
            if rng.random() < 0.5:
                line[place] = rng.randrange(256)
            else:
                del line[place : place + rng.randint(1, 8)]
            if not line:
                break
        try:
            parse_line(bytes(line), "f:1")
            accepted += 1
        except DataError as error:
            assert str(error).startswith("f:1")
    assert 0 < accepted < 3000


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
    lines = json.dumps(exchange("q")).encode() * 1000
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


def test_a_line_that_would_fill_the_memory_is_named(tmp_path):
    content = json.dumps(exchange("q")).encode() + b"\n" + bytes(33 << 20)
    for name, packed in (("a.jsonl", content), ("b.jsonl.zst", zstandard.compress(content))):
        path = tmp_path / name
        path.write_bytes(packed)
        message = rf"^{re.escape(str(path))}:2: this line has more than 32 MB; write one record per line"
        with pytest.raises(DataError, match=message):
            check_data(path, on_bad_sample="skip", cache=False)
        with pytest.raises(DataError, match=message):
            list(read_conversations(path))


def test_a_gigabyte_in_a_small_zstd_file_is_decompressed_part_by_part(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    with zstandard.open(path, "wb") as file:
        for _ in range(256):
            file.write(bytes(4 << 20))
    assert path.stat().st_size < 1 << 16
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open_data(path) as content:
        assert content.read(1) == b"\0"
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used) * 1024 < 400e6


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


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_a_json_array_is_read_record_by_record(tmp_path, suffix):
    records = [exchange("ä"), exchange("b") | {"id": 2}]
    text = "\ufeff" + json.dumps(records, ensure_ascii=False, indent=2)
    path = tmp_path / f"data{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    dataset = ChatDataset(path, None, None)
    assert [dataset.conversation(index).messages[0]["content"] for index in range(len(dataset))] == ["ä", "b"]
    assert dataset.location(1) == f"{path}: record 2"
    rest = ChatDataset(path, None, None, rejected=[dataset.location(0)])
    assert [rest.conversation(0).messages[0]["content"], len(rest)] == ["b", 1]
    report = check_data(path, cache=False)
    assert (report.lines, report.samples) == (2, 2)


def test_a_json_array_that_cannot_be_read_is_refused_in_one_line(tmp_path, monkeypatch):
    path = tmp_path / "data.json"
    path.write_text('[{"messages": []},\n {"messages": 3')
    with pytest.raises(DataError, match=rf"^{path}:2:16: invalid JSON in an array of records"):
        ChatDataset(path, None, None)
    monkeypatch.setattr("hynb.data.files._ARRAY_LIMIT_BYTES", 10)
    with pytest.raises(DataError, match=r"jq -c '\.\[\]' data\.json > data\.jsonl$"):
        ChatDataset(path, None, None)


def test_a_record_of_a_json_array_is_named_by_its_number(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([exchange("q"), {"messages": 3}], indent=2))
    with pytest.raises(DataError, match=rf"^{path}: record 2: must be "):
        list(read_conversations(path))
    with pytest.raises(DataError, match=rf"^{path}: record 2: must be "):
        check_data(path, cache=False)


@pytest.mark.parametrize(
    ("name", "record", "command"),
    [
        ("one.json", exchange("q"), "jq -c '.' one.json > one.jsonl"),
        ("one.jsonl", exchange("q"), "jq -c '.' one.jsonl > one-lines.jsonl"),
        ("all.json", {"data": [exchange("q")]}, "jq -c '.data[]' all.json > all.jsonl"),
        ("all.json.gz", {"data": [exchange("q")]}, "zcat all.json.gz | jq -c '.data[]' > all.jsonl"),
    ],
)
def test_an_object_over_several_lines_is_refused_in_one_line(tmp_path, name, record, command):
    path = tmp_path / name
    content = json.dumps(record, indent=2).encode()
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for read in (lambda: list(read_conversations(path)), lambda: check_data(path, on_bad_sample="skip", cache=False)):
        with pytest.raises(DataError) as caught:
            read()
        (problem,) = caught.value.problems
        assert problem.startswith(f"{path}: begins with a JSON object over several lines") and command in problem


def test_a_first_line_that_is_broken_is_an_invalid_line(tmp_path):
    good = json.dumps(exchange("q"))
    for number, first in enumerate((good[:-2], good + " x", "{")):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(f"{first}\n{good}\n")
        report = check_data(path, on_bad_sample="skip", cache=False)
        assert report.samples == 1 and report.rejected[0].problem.startswith(f"{path}:1:")


CALL = {"id": "1", "function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"messages": [QUESTION, ANSWER | {"reasoning_content": 5}]},
            "message 2: reasoning_content must be text, and is 5 (a number)",
        ),
        (
            {"messages": [QUESTION, ANSWER | {"thinking": ["a"]}]},
            "message 2: thinking must be text, and is ['a'] (a list)",
        ),
        ({"messages": [QUESTION | {"name": {}}, ANSWER]}, "message 1: name must be text, and is {} (an object)"),
        ({"messages": [QUESTION | {"tool_call_id": 1}, ANSWER]}, "message 1: tool_call_id must be text, and is 1"),
        (
            {"messages": [QUESTION | {"content": {"a": 1}}, ANSWER]},
            "the user must be text, and is {'a': 1} (an object)",
        ),
        ({"messages": [QUESTION, ANSWER | {"tool_calls": "f"}]}, "message 2: tool_calls must be a list, not text"),
        (
            {"messages": [QUESTION, ANSWER | {"tool_calls": [CALL | {"id": 1}]}]},
            "call 1: its id must be text, not a number",
        ),
        (
            {"messages": [QUESTION, ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}]},
            "message 2: tool call 1: its arguments must be an object, not a list",
        ),
        (
            {"messages": [QUESTION, ANSWER], "tools": 3},
            "tools: must be a list of tool descriptions, not 3 (a number)",
        ),
        ({"messages": [QUESTION, ANSWER], "tools": ["f"]}, "tools: tool 1 must be an object, not 'f' (text)"),
        (
            {"messages": [QUESTION, ANSWER], "tools": [{"function": 1}]},
            "tools: the function of tool 1 must be an object",
        ),
        ({"messages": [QUESTION, ANSWER], "reasoning_effort": 3}, "reasoning_effort: must be text, not 3 (a number)"),
    ],
)
def test_a_value_of_a_wrong_type_is_named_with_its_place_key_and_type(record, message):
    with pytest.raises(DataError) as caught:
        parse_line(json.dumps(record).encode(), "f:1")
    assert str(caught.value).startswith("f:1: ") and message in str(caught.value)
