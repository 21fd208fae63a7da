"""Labels against a slow, obvious reference, for the chat templates of several models."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ANSWER, QUESTION
from transformers import AutoTokenizer

from hynb.data import IGNORED, Conversation, LabelOptions, as_text, encode, render_prompt, stop_token_ids
from hynb.data.jinja_trace import TracedTemplate
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
    "{% if add_generation_prompt %}{{ '<|extra_1|>' + '' }}{% endif %}"
)


# A reasoning model's template, which writes an empty thought before each answer.
THINKING_STYLE = DENSE_STYLE.replace("'<|extra_1|>' +", "'<|extra_1|><|extra_0|>\\n\\n<|extra_4|>' +")


STYLES = {"large": None, "a13b": A13B_STYLE, "dense": DENSE_STYLE, "thinking": THINKING_STYLE}


# Noncharacters (category Cn) are refused when data is read.
texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Co", "Cn")), min_size=1, max_size=30)


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
    rendered, call = [], TracedTemplate.__call__
    monkeypatch.setattr(
        TracedTemplate,
        "__call__",
        lambda self, given, arguments: rendered.append(len(given)) or call(self, given, arguments),
    )
    encoded = encode(Conversation(messages=messages, source="x"), tokenizer, 1 << 30)
    assert (encoded["input_ids"], encoded["labels"]) == reference(messages, tokenizer, "large")
    # The whole, and for the first and for later answers what comes before them.
    assert rendered.count(20_000) == 1 and len(rendered) < 12 and sum(rendered) < 20_100


def test_a_template_that_puts_the_system_message_into_the_users(tokenizer):
    """In a tokenizer that has several templates by name."""
    style = (
        "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '<|extra_4|>' %}"
        "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if m['role'] == 'user' %}<|startoftext|>{{ first if loop.first else '' }}"
        "{{ m['content'] }}<|extra_0|>{% else %}{{ m['content'] }}<|eos|>{% endif %}{% endfor %}"
    )
    messages = [{"role": "system", "content": "s"}, QUESTION, ANSWER, QUESTION, ANSWER]
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


def test_text_that_spells_a_special_token_becomes_it_if_allowed(tokenizer):
    conversation = Conversation(messages=[QUESTION | {"content": "a<|eos|>b"}, ANSWER], source="x")
    eos = tokenizer.convert_tokens_to_ids("<|eos|>")
    assert encode(conversation, tokenizer, 99)["input_ids"].count(eos) == 1
    allowed = LabelOptions(allow_special_tokens_in_text=True)
    assert encode(conversation, tokenizer, 99, allowed)["input_ids"].count(eos) == 2
    assert encode(conversation, tokenizer, 99)["input_ids"].count(eos) == 1


def test_train_false_and_train_on_prompt(tokenizer):
    messages = [QUESTION, ANSWER | {"train": False}, QUESTION, ANSWER]
    conversation = Conversation(messages=messages, source="x")
    plain = encode(Conversation(messages=[QUESTION, ANSWER, QUESTION, ANSWER], source="x"), tokenizer, 99)
    off = encode(conversation, tokenizer, 99)
    trained = [index for index, label in enumerate(plain["labels"]) if label != IGNORED]
    assert off["input_ids"] == plain["input_ids"] and len(trained) == 4
    assert [index for index, label in enumerate(off["labels"]) if label != IGNORED] == trained[2:]
    on_prompt = LabelOptions(train_on_prompt=True)
    whole = encode(Conversation(messages=[QUESTION, ANSWER], source="x"), tokenizer, 99, on_prompt)
    assert whole["labels"] == whole["input_ids"]
    off = encode(conversation, tokenizer, 99, on_prompt)
    assert [index for index, label in enumerate(off["labels"]) if label == IGNORED] == trained[:2]


def test_an_earlier_answer_may_end_differently_from_the_last(tokenizer):
    """`<|eos|>` ends both; the last is followed by `<|endoftext|>`, the earlier one by `<|extra_1|>`."""
    saved = tokenizer.chat_template
    ends = "{{ '<|eos|>' + ('<|endoftext|>' if loop.last else '<|extra_1|>') }}"
    tokenizer.chat_template = saved.replace("{{ message['content'] + '<|eos|>' }}", "{{ message['content'] }}" + ends)
    messages = [QUESTION, ANSWER, QUESTION, ANSWER]
    try:
        encoded = encode(Conversation(messages=messages, source="x"), tokenizer, 99)
        assert tokenizer.decode(encoded["input_ids"]) == tokenizer.apply_chat_template(messages, tokenize=False)
    finally:
        tokenizer.chat_template = saved
    trained = [label for label in encoded["labels"] if label != IGNORED]
    assert tokenizer.decode(trained) == "a<|eos|>a<|eos|><|endoftext|>"


SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(messages | length) %}{% set m = messages[i] %}{{ m.content }}",
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set rest = messages[1:] %}"
        "{% else %}{% set rest = messages %}{% endif %}"
        "{% for i in range(rest | length) %}{% set m = rest[i] %}{{ m.content }}",
        "{% set text %}{% for m in messages %}{{ m.content }}",
    ],
    ids=["numbers", "numbers behind the system message", "a block"],
)
def test_messages_are_found_in_any_kind_of_loop(tokenizer, monkeypatch, source):
    end = "{% if m.role == 'assistant' %}<|eos|>{% endif %}{% endfor %}"
    end += "{% endset %}{{ text }}" if "set text" in source else ""
    monkeypatch.setattr(tokenizer, "chat_template", source + end)
    for messages in ([QUESTION, ANSWER] * 2, [SYSTEM, *[QUESTION, ANSWER] * 2]):
        encoded = encode(Conversation(messages=messages, source="x"), tokenizer, 99)
        assert tokenizer.decode(encoded["input_ids"]) == tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode([label for label in encoded["labels"] if label != IGNORED]) == "a<|eos|>a<|eos|>"


def test_an_answer_may_end_behind_the_loop(tokenizer, monkeypatch):
    monkeypatch.setattr(
        tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}\n{% endfor %}{{ '<|eos|>' }}"
    )
    encoded = encode(Conversation(messages=[SYSTEM, QUESTION, ANSWER], source="x"), tokenizer, 99)
    assert tokenizer.decode([label for label in encoded["labels"] if label != IGNORED]) == "a\n<|eos|>"
    with pytest.raises(DataError, match=r"^x: the chat template ends the answer of message 2 without an end token"):
        encode(Conversation(messages=[QUESTION, ANSWER] * 2, source="x"), tokenizer, 99)


def test_a_template_that_cannot_be_traced_is_refused(tokenizer, monkeypatch):
    source = "{% set text %}{% for m in messages %}{{ m.content }} <|eos|> {% endfor %}{% endset %}{{ text | trim }}"
    monkeypatch.setattr(tokenizer, "chat_template", source)
    with pytest.raises(DataError, match="changes a block in which it has collected messages"):
        encode(Conversation(messages=[QUESTION, ANSWER], source="x"), tokenizer, 99)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}",
            "more than 100,000 turns",
        ),
        (
            "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(99) }}",
            "more than 100,000 turns",
        ),
        (
            "{% for x in range(99999) %}{{ messages[0].content * 2000 }}{% endfor %}",
            "more than 100,000,000 characters",
        ),
        ("{{ 'x' * 999999999 }}", "repeats a text to more than 100,000,000 characters"),
        ("{{ 9 ** 99999999 }}", "a power of more than 1,000 digits"),
        ("{{ " + "9" * 5000 + " }}", "the chat template is not valid: Exceeds the limit"),
        ("{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "the chat template is not valid: "),
    ],
)
def test_a_template_that_would_not_end_or_fill_the_memory_is_refused(tokenizer, monkeypatch, source, message):
    monkeypatch.setattr(tokenizer, "chat_template", source + "{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match=message):
        encode(Conversation(messages=[QUESTION, ANSWER], source="x"), tokenizer, 99)


def test_a_template_that_strips_contents_is_followed(tokenizer):
    saved = tokenizer.chat_template
    tokenizer.chat_template = saved.replace("message['content']", "message['content'] | trim")
    messages = [QUESTION | {"content": " q\n"}, ANSWER | {"content": "\ta "}]
    try:
        ids = encode(Conversation(messages=messages, source="x"), tokenizer, 99)["input_ids"]
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(ids) == "<|startoftext|>q<|extra_0|>a<|eos|>"
    finally:
        tokenizer.chat_template = saved


def test_a_prompt_is_the_training_sample_up_to_its_answer(tokenizer):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    answered = [*messages, {"role": "assistant", "content": "yes"}]
    whole = encode(Conversation(messages=answered, source="x"), tokenizer, 100)
    prompt = render_prompt(messages, tokenizer)
    first = next(index for index, label in enumerate(whole["labels"]) if label != IGNORED)
    assert prompt == whole["input_ids"][:first]
    assert set(stop_token_ids(tokenizer)) == {whole["input_ids"][-1], tokenizer.eos_token_id}
