"""Labels against a slow, obvious reference; invalid lines with their location; data sets and batches."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_data
from transformers import AutoTokenizer

import hynb.hunyuan_large  # noqa: F401  registers the tokenizer
from hynb.data import (
    IGNORED,
    ChatDataset,
    Collator,
    Conversation,
    as_text,
    check_data,
    encode,
    read_conversations,
    render_prompt,
    stop_token_ids,
)
from hynb.data.files import parse_line
from hynb.demo.pretrain import write_tokenizer
from hynb.errors import DataError

# The template of Hunyuan-A13B: a marker before the answer, which is not part of it.
A13B_STYLE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}<|startoftext|>{{ m['content'] }}<|extra_4|>"
    "{% elif m['role'] == 'user' %}<|startoftext|>{{ m['content'] }}<|extra_0|>"
    "{% else %}<|extra_1|>{{ m['content'] }}<|eos|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|extra_1|>{% endif %}"
)
# The template of the dense models: a marker at the beginning, one after the system's text, one before each turn.
DENSE_STYLE = (
    "{{ '<|bos|>' }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '<|extra_3|>' }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|extra_5|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|extra_1|>' + m['content'] + '<|extra_2|>' }}{% endif %}{% endfor %}"
)
# A reasoning model's template, which writes an empty thought before each answer.
THINKING_STYLE = DENSE_STYLE.replace("'<|extra_1|>' +", "'<|extra_1|><|extra_0|>\\n\\n<|extra_4|>' +")
STYLES = {"large": None, "a13b": A13B_STYLE, "dense": DENSE_STYLE, "thinking": THINKING_STYLE}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, vocab_size=700, samples=500)
    return AutoTokenizer.from_pretrained(folder)


texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Co")), min_size=1, max_size=30)


@st.composite
def conversations(draw):
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for turn in range(draw(st.integers(1, 3))):
        # Hunyuan-Large's template refuses an empty message only if it is the first.
        messages.append({"role": "user", "content": draw(st.one_of(texts, st.just("")) if turn else texts)})
        messages.append({"role": "assistant", "content": draw(texts.filter(str.strip))})
    return messages


def reference(messages, tokenizer, style):
    """Ids and labels, piece by piece as the template's source has them."""

    def special(name):
        return [tokenizer.convert_tokens_to_ids(name)]

    def text(content):
        return tokenizer.encode(content, add_special_tokens=False, split_special_tokens=True)

    if style in ("dense", "thinking"):
        return labelled([(special("<|bos|>"), False), *dense_pieces(messages, text, special, style)])
    pieces = []
    for number, message in enumerate(messages):
        if message["role"] == "system":
            pieces += [(special("<|startoftext|>") + text(message["content"]) + special("<|extra_4|>"), False)]
        elif message["role"] == "user":
            after_system = number == 1 and messages[0]["role"] == "system" and style == "large"
            opening = [] if after_system else special("<|startoftext|>")
            pieces += [(opening + text(message["content"]) + special("<|extra_0|>"), False)]
        else:
            if style == "a13b":
                pieces += [(special("<|extra_1|>"), False)]
            pieces += [(text(message["content"]) + special("<|eos|>"), True)]
    return labelled(pieces)


def dense_pieces(messages, text, special, style):
    thought = special("<|extra_0|>") + text("\n\n") + special("<|extra_4|>") if style == "thinking" else []
    for message in messages:
        content = text(message["content"])
        if message["role"] == "system":
            yield content + special("<|extra_3|>"), False
        elif message["role"] == "user":
            yield special("<|extra_5|>") + content, False
        else:
            yield special("<|extra_1|>") + thought, False
            yield content + special("<|extra_2|>"), True


def labelled(pieces):
    pieces = list(pieces)
    ids = [token for tokens, _ in pieces for token in tokens]
    labels = [token if trained else IGNORED for tokens, trained in pieces for token in tokens]
    return ids, labels


@pytest.mark.parametrize("style", STYLES)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_labels_equal_the_reference(tokenizer, style, data):
    messages = data.draw(conversations())
    saved = tokenizer.chat_template
    tokenizer.chat_template = STYLES[style] or saved
    try:
        encoded = encode(Conversation(messages=messages, source="x"), tokenizer, 10_000)
    finally:
        tokenizer.chat_template = saved
    assert (encoded["input_ids"], encoded["labels"]) == reference(messages, tokenizer, style)


def test_the_template_is_rendered_a_few_times_however_many_turns(tokenizer, monkeypatch):
    messages = [{"role": ("user", "assistant")[turn % 2], "content": "a"} for turn in range(20_000)]
    rendered, apply_chat_template = [], tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer,
        "apply_chat_template",
        lambda given, **options: rendered.append(len(given)) or apply_chat_template(given, **options),
    )
    encoded = encode(Conversation(messages=messages, source="x"), tokenizer, 1 << 30)
    assert (encoded["input_ids"], encoded["labels"]) == reference(messages, tokenizer, "large")
    assert rendered == [20_000, *range(2, 33, 2)]


def test_a_template_that_puts_the_system_message_into_the_users(tokenizer):
    """In a tokenizer that has several templates by name."""
    style = (
        "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '<|extra_4|>' %}"
        "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if m['role'] == 'user' %}<|startoftext|>{{ first if loop.first else '' }}"
        "{{ m['content'] }}<|extra_0|>{% else %}{{ m['content'] }}<|eos|>{% endif %}{% endfor %}"
    )
    messages = [{"role": "system", "content": "s"}, ROLE, ANSWER, ROLE, ANSWER]
    saved = tokenizer.chat_template
    tokenizer.chat_template = {"default": style, "tool_use": "{{ messages }}"}
    try:
        shown = as_text(Conversation(messages=messages, source="x"), tokenizer, 100)
    finally:
        tokenizer.chat_template = saved
    assert shown == "<|startoftext|>s<|extra_4|>q<|extra_0|>⟦a<|eos|>⟧<|startoftext|>q<|extra_0|>⟦a<|eos|>⟧"


@given(messages=conversations(), limit=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_a_sample_is_truncated_at_max_seq_length(tokenizer, messages, limit):
    sample = Conversation(messages=messages, source="x")
    whole, truncated = encode(sample, tokenizer, 10_000), encode(sample, tokenizer, limit)
    for name in whole:
        assert truncated[name] == whole[name][:limit]


def test_golden_ids_of_upstreams_tokenizer(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "hunyuan-large")
    for line in (shared / "golden" / "chat_ids.jsonl").read_text().splitlines():
        golden = json.loads(line)
        sample = Conversation(messages=golden["messages"], source="golden")
        if any("<|" in message["content"] for message in golden["messages"]):
            # The one intended difference: text in a message that spells a special token stays text.
            assert encode(sample, tokenizer, 10_000)["input_ids"] != golden["ids"]
        else:
            assert encode(sample, tokenizer, 10_000)["input_ids"] == golden["ids"]
        assert tokenizer.apply_chat_template(golden["messages"], tokenize=False) == golden["text"]


def test_text_that_spells_a_special_token_stays_text(tokenizer):
    messages = [{"role": "user", "content": "a<|eos|>b"}, {"role": "assistant", "content": "<|extra_0|>"}]
    encoded = encode(Conversation(messages=messages, source="x"), tokenizer, 100)
    eos, marker = map(tokenizer.convert_tokens_to_ids, ("<|eos|>", "<|extra_0|>"))
    assert encoded["input_ids"].count(eos) == 1 and encoded["input_ids"].count(marker) == 1
    assert marker not in encoded["labels"] and encoded["labels"][-1] == eos


def test_a_prompt_is_the_training_sample_up_to_its_answer(tokenizer):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    answered = [*messages, {"role": "assistant", "content": "yes"}]
    whole = encode(Conversation(messages=answered, source="x"), tokenizer, 100)
    prompt = render_prompt(messages, tokenizer)
    first = next(index for index, label in enumerate(whole["labels"]) if label != IGNORED)
    assert prompt == whole["input_ids"][:first]
    assert stop_token_ids(tokenizer) == [whole["input_ids"][-1]]


ROLE = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
INVALID = [
    (b"{", "invalid JSON"),
    (b"[]", 'must be {"messages"'),
    (b"\xff\xfe", "invalid UTF-8 at byte 0"),
    (b"[" * 100_000, "JSON that cannot be read"),
    (b'{"messages": 1}', 'must be {"messages"'),
    (json.dumps({"messages": []}).encode(), "must be"),
    (json.dumps({"messages": [1]}).encode(), "message 1: must be"),
    (json.dumps({"messages": [{"role": "bot", "content": "x"}]}).encode(), "role 'bot' is unknown"),
    (json.dumps({"messages": [ROLE]}).encode(), "there is no answer to train on"),
    (json.dumps({"messages": [ANSWER]}).encode(), "first message is the assistant's"),
    (json.dumps({"messages": [ROLE, ROLE, ANSWER]}).encode(), "two messages of the user follow each other"),
    (json.dumps({"messages": [ROLE, ANSWER, ANSWER]}).encode(), "message 3: the assistant's message follows"),
    (json.dumps({"messages": [ROLE, {"role": "system", "content": "s"}, ANSWER]}).encode(), "must come first"),
    (json.dumps({"messages": [ROLE, {"role": "assistant", "content": " "}]}).encode(), "answer is empty"),
    (json.dumps({"messages": [{"role": "user", "content": 3}, ANSWER]}).encode(), "must be text, not int"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}', "surrogate"),
]


@pytest.mark.parametrize(("line", "message"), INVALID)
def test_an_invalid_line_is_named(line, message):
    with pytest.raises(DataError) as caught:
        parse_line(line, "file.jsonl:7")
    assert str(caught.value).startswith("file.jsonl:7") and message in str(caught.value)


def test_mutated_lines_are_read_or_named():
    rng = random.Random(5)
    good = json.dumps({"messages": [ROLE, ANSWER]}).encode()
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


def test_the_data_set_reads_each_line_by_its_offset(tokenizer, tmp_path):
    path = tiny_data(tmp_path / "train.jsonl", 12)
    path.write_text("\n" + path.read_text().replace("\n", "\n\n"), encoding="utf-8")
    dataset = ChatDataset(path, tokenizer, 512)
    read = list(read_conversations(path))
    assert len(dataset) == len(read) == 12
    for index in (11, 0, 5):
        assert dataset.conversation(index) == read[index]
        assert dataset[index] == encode(read[index], tokenizer, 512)


def test_a_batch_is_padded_to_its_longest_sample():
    samples = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = Collator(pad_token_id=9)(samples)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_the_preview_marks_what_is_trained_on(tokenizer):
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    sample = Conversation(messages=messages, source="x")
    assert as_text(sample, tokenizer, 100) == "<|startoftext|>question<|extra_0|>⟦answer<|eos|>⟧"
    assert "tokens are cut at max_seq_length = 4" in as_text(sample, tokenizer, 4)
