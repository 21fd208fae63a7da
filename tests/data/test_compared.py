"""Trained parts under templates with loops in macros or over copied messages, or that collect their text."""

from __future__ import annotations

import json

import pytest
from real_models import MODELS, tokenizer_of

from hynb.data import IGNORED, Conversation, encode
from hynb.data.records import parse_line
from hynb.data.template import ChatTemplate
from hynb.errors import DataError

USER, ASSISTANT, SYSTEM, END = "<|extra_5|>", "<|extra_1|>", "<|extra_3|>", "<|eos|>"
NAMES = "{% set names = {'user': '<|extra_5|>', 'assistant': '<|extra_1|>', 'system': '<|extra_3|>'} %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|extra_1|>' }}{% endif %}"
# What all but three write: a token that names the role, the content, an end token.
TURN = "names[m.role] + m.content + '<|eos|>'"
LOOP = "{% for m in messages %}{{ TURN }}{% endfor %}".replace("TURN", TURN)
COLLECT = "{% set ns = namespace(text='') %}{% for m in messages %}{% set ns.text = ns.text + TURN %}{% endfor %}"
COLLECT = COLLECT.replace("TURN", TURN)
TEMPLATES = {
    "llama": "{% set loop_messages = messages %}{% for m in loop_messages %}{% set part = '<|extra_6|>' + m['role'] "
    "+ '<|extra_7|>\n\n' + m['content'] | trim + '<|eos|>' %}{% if loop.index0 == 0 %}{% set part = bos_token + part "
    "%}{% endif %}{{ part }}{% endfor %}{% if add_generation_prompt %}{{ '<|extra_6|>assistant<|extra_7|>\n\n' }}"
    "{% endif %}",
    "qwen": "{%- if messages[0].role == 'system' %}{{- '<|extra_6|>system\n' + messages[0].content + '<|eos|>\n' }}"
    "{%- else %}{{- '<|extra_6|>system\nBe kind.<|eos|>\n' }}{%- endif %}{%- for m in messages %}{%- if m.role == "
    "'user' or m.role == 'assistant' %}{{- '<|extra_6|>' + m.role + '\n' + m.content + '<|eos|>' + '\n' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|extra_6|>assistant\n' }}{%- endif %}",
    "deepseek": "{% set ns = namespace(system='') %}{%- for m in messages %}{%- if m['role'] == 'system' %}"
    "{% set ns.system = ns.system + m['content'] %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system }}"
    "{%- for m in messages %}{%- if m['role'] == 'user' %}{{ '<|extra_5|>' + m['content'] }}{%- endif %}"
    "{%- if m['role'] == 'assistant' %}{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<|extra_1|>' + content + '<|eos|>' }}"
    "{%- endif %}{%- endfor -%}{% if add_generation_prompt %}{{ '<|extra_1|><think>\n' }}{% endif %}",
    "macro": NAMES + "{% macro all(items) %}" + LOOP.replace("in messages", "in items") + "{% endmacro %}"
    "{{ all(messages) }}" + PROMPT,
    "macro, changed": NAMES + "{% macro all(items) %}\n" + LOOP.replace("in messages", "in items") + "\n"
    "{% endmacro %}{{ all(messages) | trim }}" + PROMPT,
    "macro in a loop": "{% macro texts(parts) %}{% for part in parts %}{{ part }}{% endfor %}{% endmacro %}" + NAMES
    + "{% macro count(items) %}{% for m in items %}{% endfor %}{% endmacro %}"
    + LOOP.replace("m.content", "count(messages) + texts([m.content])") + PROMPT,
    "copied": NAMES + "{% set ns = namespace(items=messages | list) %}{% if messages[0].role == 'system' %}"
    "{{ names.system + messages[0].content + '<|eos|>' }}{% set ns.items = messages[1:] %}{% endif %}"
    + LOOP.replace("in messages", "in ns.items") + PROMPT,
    "collected": NAMES + COLLECT + "{{ ns.text }}" + PROMPT,
    "collected, printed in the last iteration": NAMES
    + COLLECT.replace("{% endfor %}", "{% if loop.last %}{{ ns.text }}{% endif %}{% endfor %}") + PROMPT,
    "joined": NAMES + "{% set ns = namespace(parts=[]) %}{% for m in messages %}{% set ns.parts = ns.parts + [TURN] "
    "%}{% endfor %}{{ ns.parts | join('\n') }}".replace("TURN", TURN)
    + "{% if add_generation_prompt %}{{ '\n<|extra_1|>' }}{% endif %}",
    "rebuilt": NAMES + "{% set ns = namespace(items=[]) %}{% for m in messages %}{% set ns.items = ns.items + "
    "[{'role': m.role, 'content': m.content}] %}{% endfor %}" + LOOP.replace("in messages", "in ns.items") + PROMPT,
    "collected, with a text behind": NAMES + COLLECT + "{{ ns.text }}{{ '<|extra_2|>' }}",
}  # fmt: skip


@pytest.fixture(params=TEMPLATES)
def template(request, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[request.param])
    return request.param


def trained(tokenizer, messages):
    encoded = encode(Conversation(messages=messages, source="f:3"), tokenizer, 1 << 20)
    plain = [{name: value for name, value in message.items() if name != "train"} for message in messages]
    assert tokenizer.decode(encoded["input_ids"]) == tokenizer.apply_chat_template(plain, tokenize=False)
    parts, before = [], IGNORED
    for label in encoded["labels"]:
        if label != IGNORED:
            parts = [*parts, []] if before == IGNORED else parts
            parts[-1].append(label)
        before = label
    return [tokenizer.decode(part) for part in parts]


def turns(*contents, system="", **fields):
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": content} | fields for n, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


@pytest.mark.parametrize("fields", [{}, {"train": True}], ids=["from placeholders", "rendered"])
def test_answers_are_trained_from_the_generation_prompt_to_the_end_token(template, tokenizer, fields):
    # Without a generation prompt the model itself writes who speaks.
    before = ASSISTANT if template == "collected, with a text behind" else ""
    for first, second in (("one", "two"), ("another answer", "user"), ("5", "assistant")):
        for system in ("", "You are kind."):
            short = turns("a question", first, system=system, **fields)
            assert trained(tokenizer, short) == [before + first + END]
            long = turns("a question", first, "and then?", second, system=system, **fields)
            assert trained(tokenizer, long) == [before + first + END, before + second + END]


def test_a_thought_that_a_collecting_template_strips_is_found(tokenizer, monkeypatch):
    strip = "(m.content if loop.last else m.content.split('</think>')[-1])"
    source = (NAMES + COLLECT + "{{ ns.text }}" + PROMPT).replace("m.content", strip)
    monkeypatch.setattr(tokenizer, "chat_template", source)
    messages = turns("q", "<think>why</think>a", "r", "<think>so</think>b")
    assert trained(tokenizer, messages) == [f"a{END}", f"<think>so</think>b{END}"]
    assert ChatTemplate.of(tokenizer).shortened_turns(Conversation(messages=messages, source="f:3")) == [1]


RESULTS_IN_ANSWERS = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}{{ '<|extra_5|>' + m.content }}"
    "{% elif m.role == 'tool' %}{{ '<|extra_2|>' + m.content }}{% if loop.last %}{{ '<|extra_4|>' }}{% endif %}"
    "{% else %}{% if loop.previtem and loop.previtem.role == 'tool' %}{{ '<|extra_4|>' }}{% endif %}"
    "{{ '<|extra_1|><think>' }}{% if m.reasoning_content and loop.index0 > ns.last %}{{ m.reasoning_content }}"
    "{% endif %}{{ '</think>' + (m.content or '') }}{% for call in m.tool_calls or [] %}{{ call.function.name + "
    "(call.function.arguments | tojson) }}{% endfor %}{{ '<|eos|>' }}{% endif %}{% endfor %}" + PROMPT
)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_results_end_that_is_written_with_the_answer_is_not_trained(tokenizer, monkeypatch, order):
    """Nor does that depend on the records before: where a thought is stripped, the prompt is found in another way."""
    monkeypatch.setattr(tokenizer, "chat_template", RESULTS_IN_ANSWERS)
    call = {"function": {"name": "f", "arguments": {"a": "b"}}}
    plain = [
        {"role": "user", "content": "W?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "warm"},
        {"role": "assistant", "content": "Sunny."},
    ]
    thought = [
        message | {"reasoning_content": "why"} if message["role"] == "assistant" else message for message in plain
    ]
    thought += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "Fine."}]
    called, sunny = f'<think></think>f{{"a": "b"}}{END}', f"<think></think>Sunny.{END}"
    expected = ([called, sunny], [called, sunny, f"<think></think>Fine.{END}"])
    for number in order:
        assert trained(tokenizer, (plain, thought)[number]) == expected[number], number


def test_arguments_and_an_absent_content_are_given_as_the_template_takes_them(tokenizer, monkeypatch):
    """Arguments as JSON text to one that takes mappings alone, and null, which transformers removes."""
    calls = "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% if call.function.arguments is mapping %}"
    calls += "{{ call.function.arguments.a }}{% endif %}{% endfor %}"
    turn = "{{ names[m.role] ~ m.content }}" + calls + "{{ '<|eos|>' }}"
    source = NAMES + "{% for m in messages %}" + turn + "{% endfor %}" + PROMPT
    monkeypatch.setattr(tokenizer, "chat_template", source)
    call = {"function": {"name": "f", "arguments": '{"a": "b"}'}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    encoded = encode(Conversation(messages=messages, source="f:3"), tokenizer, 99)
    assert tokenizer.decode([label for label in encoded["labels"] if label != IGNORED]) == f"fb{END}"


def test_a_content_in_a_list_of_the_template_is_rendered_itself(tokenizer, monkeypatch):
    source = NAMES + LOOP.replace("m.content", "('hi' if m.content in ['hello', 'good day'] else m.content)") + PROMPT
    monkeypatch.setattr(tokenizer, "chat_template", source)
    assert trained(tokenizer, turns("q", "hey")) == [f"hey{END}"]
    with pytest.raises(DataError, match=r"^f:3: the chat template changes message 2"):
        trained(tokenizer, turns("q", "good day"))


def test_what_cannot_be_found_is_refused_with_the_reason(tokenizer, monkeypatch):
    by_role = (
        "{% set ns = namespace(q='', a='') %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.q = ns.q + "
        "m.content %}{% else %}{% set ns.a = ns.a + m.content + '<|eos|>' %}{% endif %}{% endfor %}{{ ns.q + ns.a }}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", by_role)
    assert trained(tokenizer, turns("q", "a")) == [f"a{END}"]
    with pytest.raises(DataError, match=r"^f:3: the chat template writes message 2 outside of a loop .* split_turns"):
        trained(tokenizer, turns("q", "a", "r", "b"))
    in_pairs = (
        "{% set ns = namespace(q='') %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.q = m.content %}"
        "{% else %}{{ 'Q: ' + ns.q + ' A: ' + m.content + '<|eos|>' }}{% endif %}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", in_pairs)
    with pytest.raises(DataError, match=r"^f:3: the chat template writes message 1 together with a later one"):
        trained(tokenizer, turns("question", "a"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("m.content | upper", "message 1: it leaves its content out or rewrites it"),
        ("m.content | replace('old', 'new')", "message 1: from character 5 of its content on, it writes 'new.*'old"),
        ("(m.content if m.role == 'user' else '')", "message 2: it leaves its content out"),
        ("m.content.split('</think>')[-1]", "message 2: it removes the part between <think> and </think>"),
    ],
)
def test_what_a_template_has_changed_is_named(tokenizer, monkeypatch, change, message):
    monkeypatch.setattr(tokenizer, "chat_template", (NAMES + LOOP + PROMPT).replace("m.content", change))
    with pytest.raises(DataError, match=rf"^f:3: the chat template changes {message}"):
        trained(tokenizer, turns("the old one", "<think>why</think> answer"))


@pytest.mark.parametrize("change", ["lower", "upper", "capitalize", "title"])
def test_a_template_that_changes_letters_never_renders_the_data_as_it_is(tokenizer, monkeypatch, change):
    monkeypatch.setattr(tokenizer, "chat_template", (NAMES + LOOP).replace("m.content", f"(m.content | {change})"))
    with pytest.raises(DataError, match=r"^f:3: the chat template .*changes message"):
        trained(tokenizer, turns("A Question of LETTERS", "An Answer of LETTERS"))


@pytest.mark.parametrize("model", MODELS)
def test_labels_of_published_templates_are_the_same_without_their_loops(model, shared, monkeypatch):
    """Markers inside of a macro are damaged, so that what belongs to a message is found by comparing."""
    tokenizer = tokenizer_of(model, shared)
    whole = "{% macro whole() %}" + tokenizer.chat_template + "{% endmacro %}{{ whole() | replace('\ufdd0', '') }}"
    monkeypatch.setattr(tokenizer, "chat_template", whole)
    for name, case in json.loads((shared / "golden" / "labels.json").read_text())[model].items():
        found = parse_line(json.dumps(case["record"]).encode(), "f:3")
        assert encode(found, tokenizer, 1 << 20) == {key: case[key] for key in ("input_ids", "labels")}, name
