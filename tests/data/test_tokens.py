"""Token ids that a check keeps are those that training would compute, or are not used."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import exchange, tiny_data, write_lines
from torch.utils.data import DataLoader

from hynb.data import ChatDataset, LabelOptions, cache_folder, check_data, encode, kept_tokens
from hynb.data.files import Conversation
from hynb.data.tokens import TokenStore

TURNS = [{"role": ("user", "assistant")[n % 2], "content": f"text {n} <|eos|> 车" * (n + 1)} for n in range(6)]
RECORDS = [
    exchange("q"),
    {"messages": TURNS, "id": 3},
    {"messages": [{"role": "system", "content": "s"}, *TURNS[:3], TURNS[3] | {"train": False}, *TURNS[4:]]},
    {"messages": 3},
    exchange("x " * 90, "y " * 90),
    exchange("z " * 300),
    exchange("q"),
]


def datasets(report, path, tokenizer, max_seq_length, **options):
    """The samples of a check, tokenised and read from the kept ids."""
    given_options = LabelOptions(**options)
    whole = ChatDataset(path, tokenizer, max_seq_length, options=given_options)
    tokenised = whole.with_answers(report.line_indices, report.answers)
    # Without a tokenizer nothing can be tokenised.
    kept = ChatDataset(path, None, max_seq_length, options=given_options)
    return tokenised, kept.with_answers(report.line_indices, report.answers).with_tokens(TokenStore(report.tokens))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"split_turns": True},
        {"train_on_prompt": True},
        {"train_on_turns": "last"},
        {"allow_special_tokens_in_text": True},
    ],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_kept_ids_and_labels_equal_those_of_tokenising(tokenizer, tmp_path, monkeypatch, options, processes):
    monkeypatch.setattr("hynb.data.scan._RANGE_BYTES", 400)
    path = write_lines(tmp_path / "a.jsonl", *RECORDS)
    given_options = {"on_bad_sample": "skip", "max_cut_share": 1, "options": LabelOptions(**options)}
    report = check_data(path, tokenizer, 300, processes=processes, **given_options)
    tokenised, kept = datasets(report, path, tokenizer, 300, **options)
    assert len(kept) == len(tokenised) == report.samples >= 4
    assert list(kept) == list(tokenised)
    assert report.tokens == check_data(path, tokenizer, 300, **given_options).tokens
    assert [kept.subset([3, 1])[index] for index in (0, 1)] == [tokenised[3], tokenised[1]]


def test_kept_ids_are_found_by_what_decides_them(tokenizer, tmp_path):
    path, other = tiny_data(tmp_path / "a.jsonl", 12), tiny_data(tmp_path / "b.jsonl", 12)
    kept = check_data(path, tokenizer, 200).tokens
    assert kept is not None and check_data(path, tokenizer, 200).tokens == kept
    # The same content in another file.
    again = check_data(other, tokenizer, 200)
    assert again.tokens == kept and not again.from_cache
    found = {kept, check_data(path, tokenizer, 201).tokens}
    found.add(check_data(path, tokenizer, 200, options=LabelOptions(train_on_prompt=True)).tokens)
    found.add(check_data([path, other], tokenizer, 200).tokens)
    template = tokenizer.chat_template
    tokenizer.chat_template = template + "\n"
    try:
        found.add(check_data(path, tokenizer, 200).tokens)
    finally:
        tokenizer.chat_template = template
    path.write_text(path.read_text().replace("car", "cat"))
    found.add(check_data(path, tokenizer, 200).tokens)
    assert len(found) == 6 and None not in found
    assert check_data(path, tokenizer, 200, cache=False).tokens is None


@pytest.mark.parametrize("damage", ["cut", "empty", "removed", "table"])
def test_damaged_files_of_ids_are_written_again(tokenizer, tmp_path, damage):
    path = tiny_data(tmp_path / "a.jsonl", 12)
    kept = check_data(path, tokenizer, 200).tokens
    content = kept.read_bytes()
    changed = {"cut": content[:-10], "empty": b"", "removed": None, "table": content[:-600] + b"x" + content[-599:]}
    kept.unlink()
    if changed[damage] is not None:
        kept.write_bytes(changed[damage])
    report = check_data(path, tokenizer, 200)
    assert report.tokens == kept
    tokenised, stored = datasets(report, path, tokenizer, 200)
    assert list(stored) == list(tokenised)
    assert not list(cache_folder().glob(".*"))


def test_a_damaged_sample_is_tokenised_and_written_again_by_the_next_check(tokenizer, tmp_path, caplog):
    path = tiny_data(tmp_path / "a.jsonl", 12)
    kept = check_data(path, tokenizer, 200).tokens
    expected = list(ChatDataset(path, tokenizer, 200))
    content = bytearray(kept.read_bytes())
    content[40] ^= 1
    kept.write_bytes(content)
    assert check_data(path, tokenizer, 200).tokens == kept
    assert list(ChatDataset(path, tokenizer, 200).with_tokens(TokenStore(kept))) == expected
    assert sum("are damaged" in message for message in caplog.messages) == 1 and not kept.exists()
    report = check_data(path, tokenizer, 200)
    assert report.tokens == kept and list(datasets(report, path, tokenizer, 200)[1]) == expected


def test_without_space_on_the_disk_nothing_is_kept(tokenizer, tmp_path, monkeypatch):
    path = tiny_data(tmp_path / "a.jsonl", 12)
    with monkeypatch.context() as patched:
        patched.setattr("hynb.data.tokens.RESERVE_BYTES", 1 << 60)
        for _ in range(2):
            report = check_data(path, tokenizer, 200)
            assert report.tokens is None and report.samples == 12
            assert "GB are free, of which" in report.tokens_note
        assert report.from_cache
    assert check_data(path, tokenizer, 200).tokens is not None


def test_a_disk_that_becomes_full_is_noted(tokenizer_folder, tmp_path):
    path = tiny_data(tmp_path / "a.jsonl", 400)
    code = (
        "import resource, sys; from transformers import AutoTokenizer; import hynb.hunyuan_large\n"
        "from hynb.data import check_data\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
        "report = check_data(sys.argv[1], AutoTokenizer.from_pretrained(sys.argv[2]), 300,"
        " processes=int(sys.argv[3]))\n"
        "print(report.samples, report.tokens, report.tokens_note)"
    )
    for processes in ("1", "2"):
        command = [sys.executable, "-c", code, str(path), str(tokenizer_folder), processes]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "400 None the disk or the quota is full"
    assert not list(cache_folder().glob("*tokens-*"))


def test_kept_ids_are_read_by_workers_and_after_pickling(tokenizer, tmp_path):
    path = tiny_data(tmp_path / "a.jsonl", 24)
    report = check_data(path, tokenizer, 200)
    tokenised, kept = datasets(report, path, tokenizer, 200)
    expected = list(tokenised)
    assert kept[3] == expected[3], "read before the workers are forked"
    assert list(pickle.loads(pickle.dumps(kept))) == expected
    assert list(pickle.loads(pickle.dumps(ChatDataset(path, None, 200))).lines(0, 24)) == list(kept.lines(0, 24))
    for dataset in (kept, tokenised):
        for context in ("fork", "spawn"):
            loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=context)
            assert list(loader) == expected
    assert kept_tokens("tokens-none") is None


PARTS = ["a", " ", "\n", "\t", "<", "|", "<|eos|>", "<|extra_0|>", "eos|>", "<think>", "é", "车", "\u2003", "\\"]
CONTENTS = st.lists(st.sampled_from(PARTS)).map("".join)


@given(
    contents=st.lists(CONTENTS.filter(str.strip), min_size=2, max_size=6),
    system=st.none() | CONTENTS.filter(str.strip),
    options=st.builds(
        LabelOptions,
        train_on_prompt=st.booleans(),
        allow_special_tokens_in_text=st.booleans(),
        train_on_turns=st.sampled_from(["as_rendered", "all", "last"]),
    ),
)
@settings(max_examples=300, deadline=None)
def test_plain_conversations_are_encoded_as_those_that_are_rendered(tokenizer, contents, system, options):
    contents = contents[: len(contents) // 2 * 2]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    plain = Conversation(messages=messages, source="f:1")
    # A message with another key is rendered by the template itself.
    rendered = plain.replaced(messages=[messages[0] | {"train": True}, *messages[1:]])
    assert encode(plain, tokenizer, 1 << 20, options) == encode(rendered, tokenizer, 1 << 20, options)
