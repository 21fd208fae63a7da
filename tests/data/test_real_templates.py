"""What is trained on under the published chat templates: golden labels, thoughts, tools, fields that are ignored."""

from __future__ import annotations

import copy
import json
import time
from datetime import datetime

import pytest
from real_models import MODELS, tokenizer_of
from transformers import AddedToken, AutoTokenizer

from hynb.data import IGNORED, LabelOptions, as_html, as_text, encode, render_prompt, stop_token_ids
from hynb.data.check import check_data
from hynb.data.preview import tokens
from hynb.data.records import parse_line
from hynb.data.template import ChatTemplate
from hynb.errors import DataError

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
EXCHANGE = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
WITH_TOOLS = {
    "tools": [TOOL],
    "messages": [
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ],
}


def conversation(record: dict):
    return parse_line(json.dumps(record, ensure_ascii=False).encode(), "f.jsonl:3")


def shown(record: dict, tokenizer, **options) -> str:
    return as_text(conversation(record), tokenizer, 1 << 20, options=LabelOptions(**options))


def trained_texts(record: dict, tokenizer, **options) -> list[str]:
    return [part.partition("⟧")[0] for part in shown(record, tokenizer, **options).split("⟦")[1:]]


@pytest.fixture(params=MODELS)
def model(request) -> str:
    return request.param


@pytest.fixture
def tokenizer(model, shared):
    return tokenizer_of(model, shared)


def test_labels_equal_the_golden_ones(model, tokenizer, shared):
    cases = json.loads((shared / "golden" / "labels.json").read_text())[model]
    assert len(cases) >= 7
    for name, case in cases.items():
        found = conversation(case["record"])
        assert ChatTemplate.of(tokenizer).render(found).text == case["text"], name
        assert encode(found, tokenizer, 1 << 20) == {key: case[key] for key in ("input_ids", "labels")}, name


def test_plain_conversations_are_encoded_as_those_that_are_rendered(tokenizer):
    end = sorted(ChatTemplate.of(tokenizer).end_tokens)[0]
    contents = ["q", " a \n", f"x{end}y", "<think>t</think>a", "<think>", "<", "/no_think q", "车 é\t", "\u2003a"]
    for number, options in enumerate([{}, {"train_on_prompt": True}, {"train_on_turns": "last"}] * 12):
        turns = [contents[(number * 5 + step * (number + 1)) % len(contents)] for step in range(2 + number % 2 * 2)]
        messages = [{"role": ("user", "assistant")[step % 2], "content": text} for step, text in enumerate(turns)]
        if number % 3 == 0:
            messages.insert(0, {"role": "system", "content": contents[number % len(contents)]})
        found = []
        # A message with another key is rendered by the template itself.
        for extra in ({}, {"train": True}):
            record = {"messages": [messages[0] | extra, *messages[1:]]}
            try:
                found.append(encode(conversation(record), tokenizer, 1 << 20, LabelOptions(**options)))
            except DataError as error:
                found.append(str(error))
        assert found[0] == found[1], (messages, options)


def test_every_answer_ends_with_a_token_at_which_generation_stops(model, tokenizer, shared):
    stops = stop_token_ids(tokenizer)
    for case in json.loads((shared / "golden" / "labels.json").read_text())[model].values():
        encoded = encode(conversation(case["record"]), tokenizer, 1 << 20)
        assert encoded["labels"][-1] in stops


@pytest.mark.parametrize(
    ("name", "call", "last"),
    [
        (
            "hunyuan-7b",
            '<tool_calls><tool_call>weather\n```json\n{"city": "Paris"}\n```</tool_call></tool_calls><|eos|>',
            "It is sunny.<|eos|>",
        ),
        (
            "hunyuan-a13b",
            '<tool_calls>[{"name": "weather", "arguments": {"city": "Paris"}}]</tool_calls><|eos|>',
            "助手：It is sunny.<|eos|>",
        ),
        (
            "hy3",
            "<think:opensource></think:opensource><tool_calls:opensource>\n<tool_call:opensource>weather"
            "<tool_sep:opensource>\n<arg_key:opensource>city</arg_key:opensource>\n"
            "<arg_value:opensource>Paris</arg_value:opensource>\n</tool_call:opensource>\n"
            "</tool_calls:opensource><｜hy_eos:opensource｜>",
            "<think:opensource></think:opensource>It is sunny.<｜hy_eos:opensource｜>",
        ),
    ],
)
def test_tool_calls_are_trained_and_results_are_not(shared, name, call, last):
    tokenizer = tokenizer_of(name, shared)
    assert trained_texts(WITH_TOOLS, tokenizer) == [call, last]
    # Arguments as JSON text, content null or absent, OpenAI's older function_call, ShareGPT: all the same.
    as_text_arguments = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages = WITH_TOOLS["messages"]
    forms = [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [as_text_arguments]},
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
    ]
    for form in forms:
        record = {"tools": [TOOL], "messages": [messages[0], form, *messages[2:]]}
        assert trained_texts(record, tokenizer) == [call, last], form
    sharegpt = {
        "tools": json.dumps([TOOL]),
        "conversations": [
            {"from": "human", "value": messages[0]["content"]},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "It is sunny."},
        ],
    }
    assert trained_texts(sharegpt, tokenizer) == [call, last]


def test_thoughts_of_hy3_are_trained_in_every_turn(shared):
    tokenizer = tokenizer_of("hy3", shared)
    record = {
        "reasoning_effort": "high",
        "messages": [
            {"role": "user", "content": "1+1"},
            {"role": "assistant", "reasoning_content": "one and one", "content": "2"},
            {"role": "user", "content": "2+2"},
            {"role": "assistant", "reasoning_content": "two and two", "content": "4"},
        ],
    }
    eos = "<｜hy_eos:opensource｜>"
    assert trained_texts(record, tokenizer) == [
        f"<think:opensource>one and one</think:opensource>2{eos}",
        f"<think:opensource>two and two</think:opensource>4{eos}",
    ]
    record["reasoning_effort"] = "medium"
    with pytest.raises(DataError, match=r"f.jsonl:3: the chat template refuses .*should be no_think/low/high"):
        shown(record, tokenizer)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize("content", [{"content": ""}, {"content": None}, {}], ids=["empty", "null", "absent"])
def test_an_answer_that_is_a_thought_alone_is_trained_where_the_template_renders_it(shared, name, content):
    eos = "<｜hy_eos:opensource｜>"
    thinking = {"role": "assistant", name: "I have nothing to say."} | content
    record = {"reasoning_effort": "high", "messages": [EXCHANGE[0], thinking, *EXCHANGE]}
    found = trained_texts(record, tokenizer_of("hy3", shared))
    assert found == [
        f"<think:opensource>I have nothing to say.</think:opensource>{eos}",
        f"<think:opensource></think:opensource>a{eos}",
    ]
    record = {"messages": record["messages"]}
    with pytest.raises(DataError, match=r"does not render messages\[\]\.reasoning"):
        shown(record, tokenizer_of("hunyuan-7b", shared))
    with pytest.raises(DataError, match=r"message 2: the assistant's answer is empty but for its thought, which"):
        shown(record, tokenizer_of("hunyuan-7b", shared), allow_ignored_fields=True)


@pytest.mark.parametrize("thought", ["", "  ", None, 5, ["x"]])
def test_an_answer_without_content_and_thought_is_refused(thought):
    answer = {"role": "assistant", "reasoning_content": thought, "content": ""}
    with pytest.raises(DataError, match="message 2: the assistant's answer is empty"):
        conversation({"messages": [EXCHANGE[0], answer]})


def test_thoughts_that_a_template_strips_are_counted_refused_or_split(shared):
    tokenizer = tokenizer_of("hunyuan-7b", shared)
    thought = "<think>\n{}\n</think>\n<answer>\n{}\n</answer>"
    messages = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": thought.format("one", "2")},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": thought.format("two", "4")},
    ]
    record = {"messages": messages}
    last = thought.format("two", "4") + "<|eos|>"
    assert trained_texts(record, tokenizer) == ["2<|eos|>", last]
    assert trained_texts(record, tokenizer, train_on_turns="last") == [last]
    with pytest.raises(DataError, match=r"message 2 .* split_turns: true"):
        shown(record, tokenizer, train_on_turns="all")
    template = ChatTemplate.of(tokenizer)
    assert template.shortened_turns(conversation(record)) == [1]
    assert template.shortened_turns(conversation({"messages": messages[:2]})) == []


@pytest.mark.parametrize(
    ("name", "record", "field"),
    [
        ("hunyuan-large", WITH_TOOLS, "tools, messages[].tool_calls"),
        ("hunyuan-large", {"enable_thinking": False, "messages": EXCHANGE}, "enable_thinking"),
        ("hy3", {"chat_template_kwargs": {"enable_thinking": True}, "messages": EXCHANGE}, "enable_thinking"),
        ("hy3", {"system": "You are a pirate.", "messages": EXCHANGE}, "system"),
        ("hunyuan-7b", {"images": ["a.png"], "messages": EXCHANGE}, "images"),
        ("hunyuan-large", {"reasoning_effort": "high", "messages": EXCHANGE}, "reasoning_effort"),
        ("hunyuan-7b", {"reasoning_effort": "high", "messages": EXCHANGE}, "reasoning_effort"),
        (
            "hunyuan-7b",
            {"messages": [EXCHANGE[0], EXCHANGE[1] | {"reasoning_content": "why"}]},
            "messages[].reasoning_content",
        ),
        ("hy3", {"messages": [EXCHANGE[0] | {"name": "Ann"}, EXCHANGE[1]]}, "messages[].name"),
        ("hy3", {"messages": [EXCHANGE[0], EXCHANGE[1] | {"audio": {"id": "x"}}]}, "messages[].audio"),
        (
            "hy3",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q", "note": "lost"}]}, EXCHANGE[1]]},
            "messages[].content[].note",
        ),
        (
            "hy3",
            {
                "messages": [
                    EXCHANGE[0],
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "thinking", "thinking": "why", "text": "because"},
                            {"type": "text", "text": "a"},
                        ],
                    },
                ]
            },
            "messages[].content[].text",
        ),
        (
            "hy3",
            {"messages": EXCHANGE, "reasoning_effort": "low", "fallback_strategy": "reasoning_toolcall_retry"},
            "reasoning_effort",
        ),
        (
            "hy3",
            {
                "messages": [
                    EXCHANGE[0],
                    EXCHANGE[1] | {"tool_calls": [{"function": {"name": "f", "arguments": {}, "strict": True}}]},
                ]
            },
            "messages[].tool_calls[].function.strict",
        ),
    ],
)
def test_a_field_that_is_not_rendered_is_refused_by_name(shared, name, record, field):
    tokenizer = tokenizer_of(name, shared)
    with pytest.raises(DataError) as raised:
        shown(record, tokenizer)
    assert f"f.jsonl:3: the chat template does not render {field}, so" in str(raised.value)
    assert "allow_ignored_fields" in str(raised.value)
    if not field.endswith("tool_calls"):
        assert "⟦" in shown(record, tokenizer, allow_ignored_fields=True)
        return
    with pytest.raises(DataError, match=r"message 2: the assistant's answer is empty but for its tool calls, which"):
        shown(record, tokenizer, allow_ignored_fields=True)
    spoken = [message | ({"content": "I look."} if "tool_calls" in message else {}) for message in record["messages"]]
    assert "⟦I look.<|eos|>⟧" in shown(record | {"messages": spoken}, tokenizer, allow_ignored_fields=True)


@pytest.mark.parametrize("name", ["hunyuan-7b", "hunyuan-a13b"])
@pytest.mark.parametrize("answer", ["<table>1</table>", "<tool>x", "text"])
def test_an_answer_that_begins_like_a_thought_is_trained_from_its_first_character(shared, name, answer):
    tokenizer = tokenizer_of(name, shared)
    # With tools the template is rendered with its markers, and not from placeholders.
    record = {"tools": [TOOL], "messages": [EXCHANGE[0], {"role": "assistant", "content": answer}]}
    # Of Hunyuan-A13B the model itself writes who speaks, where there are tools: its generation prompt does not.
    speaker = "助手：" if name == "hunyuan-a13b" else ""
    assert trained_texts(record, tokenizer) == [f"{speaker}{answer}<|eos|>"]
    call = {"tools": [TOOL], "messages": [EXCHANGE[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]}
    assert trained_texts(call, tokenizer)[0].startswith("<tool_call")
    with pytest.raises(DataError, match="does not render enable_thinking"):
        shown(record | {"enable_thinking": False}, tokenizer)


def test_an_earlier_answer_of_which_the_template_cuts_more_than_its_thought_is_refused(shared):
    """Hunyuan-7B's template strips the characters of the tag `</answer>` from the ends of earlier answers."""
    tokenizer = tokenizer_of("hunyuan-7b", shared)
    record = {"messages": []}
    for answer in ("answers are new", "4"):
        content = f"<think>r</think><answer>{answer}</answer>"
        record["messages"] += [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    # Where it is not trained, it is as the template shows it.
    for options in ({"train_on_turns": "last"}, {"split_turns": True}):
        assert trained_texts(record, tokenizer, **options) == [f"{record['messages'][-1]['content']}<|eos|>"]
    with pytest.raises(DataError, match=r"cuts the answer of message 2, and not only its thought.* split_turns"):
        shown(record, tokenizer)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs must be an object"),
        (
            {"reasoning_effort": "high", "chat_template_kwargs": {"reasoning_effort": "low"}},
            "reasoning_effort and chat_template_kwargs.reasoning_effort have different values",
        ),
    ],
)
def test_arguments_in_a_mapping_of_their_own_are_not_lost(shared, given, message):
    with pytest.raises(DataError, match=message):
        shown({"messages": EXCHANGE} | given, tokenizer_of("hy3", shared))


def test_a_users_message_is_left_out_of_training_on_prompts(shared):
    tokenizer = tokenizer_of("hunyuan-7b", shared)
    record = {"messages": [EXCHANGE[0] | {"train": False}, EXCHANGE[1]]}
    everything = trained_texts({"messages": EXCHANGE}, tokenizer, train_on_prompt=True)
    kept = trained_texts(record, tokenizer, train_on_prompt=True)
    assert EXCHANGE[0]["content"] in "".join(everything) and EXCHANGE[0]["content"] not in "".join(kept)


def test_links_between_calls_and_results_need_no_rendering_where_the_order_says_the_same(shared):
    tokenizer = tokenizer_of("hy3", shared)
    calls = [CALL | {"id": name} for name in ("one", "two")]
    results = [{"role": "tool", "tool_call_id": name, "content": name} for name in ("one", "two")]
    start, end = WITH_TOOLS["messages"][0], WITH_TOOLS["messages"][-1]
    asking = {"role": "assistant", "content": "", "tool_calls": calls}
    in_order = {"tools": [TOOL], "messages": [start, asking, *results, end]}
    assert len(trained_texts(in_order, tokenizer)) == 2
    swapped = {"tools": [TOOL], "messages": [start, asking, *reversed(results), end]}
    with pytest.raises(DataError, match=r"does not render messages\[\].tool_call_id"):
        shown(swapped, tokenizer)
    order = r"f.jsonl:3: .* message 3 is the result of 'two' where that of 'one' belongs: put results in the order of"
    with pytest.raises(DataError, match=order):
        shown(swapped, tokenizer)
    foreign = {"tools": [TOOL], "messages": [start, asking, results[0], results[1] | {"tool_call_id": "six"}, end]}
    with pytest.raises(DataError, match=r"message 4 is the result of 'six', which none of the calls before it has"):
        shown(foreign, tokenizer)


def test_a_template_that_never_ends_an_answer_is_refused(shared):
    tokenizer = tokenizer_of("hy3", shared)
    source = tokenizer.chat_template.replace("is_training", "nothing_of_the_kind")
    saved, tokenizer.chat_template = tokenizer.chat_template, source
    try:
        with pytest.raises(
            DataError, match="writes no end token after message 2, so the model would not learn to st"
        ):
            shown({"messages": EXCHANGE}, tokenizer)
    finally:
        tokenizer.chat_template = saved


def test_text_that_spells_a_special_token_stays_text_in_all_fields(model, tokenizer):
    stop = tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer))
    for token in stop:
        record = {
            "messages": [{"role": "user", "content": f"a{token}b"}, {"role": "assistant", "content": f"c{token}d"}]
        }
        ids = encode(conversation(record), tokenizer, 1 << 20)
        as_tokens = encode(conversation(record), tokenizer, 1 << 20, LabelOptions(allow_special_tokens_in_text=True))
        number = tokenizer.convert_tokens_to_ids(token)
        assert as_tokens["input_ids"].count(number) == ids["input_ids"].count(number) + 2
        assert tokenizer.decode(ids["input_ids"]) == tokenizer.decode(as_tokens["input_ids"])


def test_an_empty_system_message_is_the_same_as_none(tokenizer):
    empty = {"messages": [{"role": "system", "content": ""}, *EXCHANGE]}
    assert shown(empty, tokenizer) == shown({"messages": EXCHANGE}, tokenizer)


def test_a_prompt_begins_every_training_sample(model, tokenizer, shared):
    cases = json.loads((shared / "golden" / "labels.json").read_text())[model]
    for name in ("single", "system"):
        messages = cases[name]["record"]["messages"]
        prompt = render_prompt(messages[:-1], tokenizer)
        whole = cases[name]["input_ids"]
        first = next(index for index, label in enumerate(cases[name]["labels"]) if label != IGNORED)
        assert prompt == whole[: len(prompt)] and len(prompt) >= first


def test_features_of_each_template(shared):
    known = {name: ChatTemplate.of(tokenizer_of(name, shared)).features() for name in MODELS}
    assert {name: found.tools for name, found in known.items()} == {
        "hunyuan-large": False,
        "hunyuan-a13b": True,
        "hunyuan-7b": True,
        "hy3": True,
    }
    assert [name for name, found in known.items() if found.thoughts] == ["hy3"]
    assert all(found.system and found.end_tokens for found in known.values())
    assert known["hy3"].arguments == (
        "fallback_strategy", "preserved_thinking", "raw_last_assistant", "reasoning_effort",
    )  # fmt: skip


def test_the_preview_tells_thoughts_calls_and_results_apart(shared):
    tokenizer = tokenizer_of("hy3", shared)
    messages = [dict(message) for message in WITH_TOOLS["messages"]]
    messages[1]["reasoning_content"] = "look it up"
    found = conversation({"tools": [TOOL], "reasoning_effort": "high", "messages": messages})
    parts: dict[str, str] = {}
    for token in tokens(found, tokenizer, 1 << 20):
        parts[token.part] = parts.get(token.part, "") + token.text
    assert "<think:opensource>look it up</think:opensource>" in parts["thought"]
    assert parts["tool call"].startswith("<tool_calls:opensource>") and "Paris" in parts["tool call"]
    assert "sunny" in parts["tool result"] and "It is sunny." in parts[""]
    page = as_html(found, tokenizer, 1 << 20)
    assert all(f">{name}</span>" in page and f"· {name}" in page for name in ("thought", "tool call", "tool result"))
    assert "\x1b[3m" in as_text(found, tokenizer, 1 << 20, colour=True)


QWEN_TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}{% for tool in tools %}{{- tool | tojson }}{% endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}"
    '{%- for call in message.tool_calls or [] %}{{- \'\\n<tool_call>\\n{"name": "\' + call.function.name }}'
    "{{- '\", \"arguments\": ' + (call.function.arguments | tojson) + '}\\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@pytest.fixture(scope="module")
def chatml(shared):
    """A tokenizer with a template in another style, whose end token is followed by a line break."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "hunyuan-large")
    tokenizer.add_tokens(
        [AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")], special_tokens=True
    )
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = QWEN_TOOLS
    return tokenizer


def test_arguments_as_text_are_not_encoded_twice(chatml):
    for arguments in ({"city": "Paris"}, '{"city": "Paris"}'):
        call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
        messages = [WITH_TOOLS["messages"][0], WITH_TOOLS["messages"][1] | {"tool_calls": [call]}]
        shown_call = '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
        assert trained_texts({"tools": [TOOL], "messages": messages}, chatml) == [shown_call]


def test_special_tokens_in_keys_and_roles_of_arguments_stay_text(chatml):
    arguments = {"<|im_end|>": "v", "role": "<|im_end|>", "x": {"role": "<|im_end|>z"}}
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    messages = [WITH_TOOLS["messages"][0], WITH_TOOLS["messages"][1] | {"tool_calls": [call]}]
    encoded = encode(conversation({"tools": [TOOL], "messages": messages}), chatml, 1 << 20)
    end = chatml.convert_tokens_to_ids("<|im_end|>")
    assert encoded["labels"].count(end) == 1 and encoded["input_ids"].count(end) == 3


def test_a_field_of_one_message_does_not_hide_that_of_another(chatml):
    """A template that renders names of tools alone, and thoughts only beside plain answers."""
    saved = chatml.chat_template
    chatml.chat_template = saved.replace(
        "(message.content or '')",
        "((message.name or '') if message.role == 'tool' else '') + "
        "((message.reasoning_content or '') if not message.tool_calls else '') + (message.content or '')",
    )
    start, calling, result, end = WITH_TOOLS["messages"]
    try:
        named = [start | {"name": "Ann"}, calling, result | {"name": "other"}, end]
        with pytest.raises(DataError, match=r"does not render messages\[\]\.name"):
            shown({"tools": [TOOL], "messages": named}, chatml)
        thinking = [start, calling | {"reasoning_content": "LOST"}, result, end | {"reasoning_content": "kept"}]
        with pytest.raises(DataError, match=r"does not render messages\[\]\.reasoning_content"):
            shown({"tools": [TOOL], "messages": thinking}, chatml)
        both = [start, calling | {"content": "I look first"}, result, end]
        assert "I look first" in shown({"tools": [TOOL], "messages": both}, chatml)
    finally:
        chatml.chat_template = saved


def test_content_that_is_dropped_beside_tool_calls_is_refused(chatml):
    saved = chatml.chat_template
    chatml.chat_template = saved.replace(
        "(message.content or '')", "('' if message.tool_calls else (message.content or ''))"
    )
    start, calling, result, end = WITH_TOOLS["messages"]
    try:
        with pytest.raises(DataError, match="the chat template changes message 2"):
            shown({"tools": [TOOL], "messages": [start, calling | {"content": "I look first"}, result, end]}, chatml)
    finally:
        chatml.chat_template = saved


def test_a_record_with_tools_is_rendered_the_same_at_any_time(shared, monkeypatch):
    tokenizer = tokenizer_of("hunyuan-a13b", shared)
    first = encode(conversation(WITH_TOOLS), tokenizer, 1 << 20)
    time.sleep(1.1)
    assert encode(conversation(WITH_TOOLS), tokenizer, 1 << 20) == first


def test_hunyuan_a13bs_time_is_one_in_training_the_records_own_or_the_present_one_in_prompts(shared):
    tokenizer = tokenizer_of("hunyuan-a13b", shared)
    template = ChatTemplate.of(tokenizer)
    text = shown(WITH_TOOLS, tokenizer)
    assert template.written_time and f"当前时间：{template.written_time} 星期五" in text
    own = WITH_TOOLS | {"current_time": "2024-02-29T08:30"}
    assert "当前时间：2024-02-29 08:30:00 星期四" in shown(own, tokenizer)
    with pytest.raises(DataError, match="does not render current_time"):
        shown({"messages": EXCHANGE, "tools": [], "current_time": "2024-02-29"}, tokenizer)
    before = datetime.now().strftime("%Y-%m-%d")
    prompt = tokenizer.decode(render_prompt(WITH_TOOLS["messages"][:1], tokenizer, {"tools": [TOOL]}))
    assert any(f"当前时间：{day}" in prompt for day in (before, datetime.now().strftime("%Y-%m-%d")))
    own = render_prompt(WITH_TOOLS["messages"][:1], tokenizer, {"tools": [TOOL], "current_time": "2024-02-29"})
    assert "2024-02-29 00:00:00" in tokenizer.decode(own)
    assert "current_time" in template.features().arguments


@pytest.mark.parametrize("text", ["\ufdd01\ufdd1 x", "\ud800"])
def test_characters_that_are_no_text_are_refused_in_every_field(text):
    record = {"tools": [{"name": "w", "description": text}], "messages": EXCHANGE}
    with pytest.raises(DataError, match=r"f.jsonl:3: tools has "):
        parse_line(json.dumps(record).encode(), "f.jsonl:3")


def test_openais_older_functions_and_content_in_parts(chatml):
    start, calling, result, end = WITH_TOOLS["messages"]
    parts = [{"type": "text", "text": "Weather in "}, {"type": "text", "text": "Paris?"}]
    old = {"functions": [TOOL["function"]], "messages": [start | {"content": parts}, calling, result, end]}
    assert shown(old, chatml) == shown(WITH_TOOLS, chatml)


def all_special(tokenizer, *more: str):
    """A copy of a tokenizer with every added token, and more, marked as special."""
    copied = copy.deepcopy(tokenizer)
    texts = [token.content for token in copied.added_tokens_decoder.values()]
    special = [AddedToken(text, special=True, normalized=False) for text in (*texts, *more)]
    copied.add_tokens(special, special_tokens=True)
    assert all(token.special for token in copied.added_tokens_decoder.values())
    return copied


TAGS = (
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<tool_calls>",
    "</tool_calls>",
    "<tool_call>",
    "</tool_call>",
)


@pytest.mark.parametrize("name", ["hunyuan-a13b", "hunyuan-7b", "hy3"])
def test_the_end_token_is_trained_and_stops_where_every_tag_is_a_special_token(shared, name):
    plain = tokenizer_of(name, shared)
    tokenizer = all_special(plain, *TAGS)
    parallel = [CALL, CALL | {"id": "c2"}]
    start, calling, result, end = WITH_TOOLS["messages"]
    calls = [start, calling | {"tool_calls": parallel}, result, result | {"tool_call_id": "c2"}, end]
    for record in (WITH_TOOLS, WITH_TOOLS | {"messages": calls}, {"messages": EXCHANGE}):
        assert trained_texts(record, tokenizer) == trained_texts(record, plain)
        ends = "<｜hy_eos:opensource｜>" if name == "hy3" else "<|eos|>"
        assert all(text.endswith(ends) for text in trained_texts(record, tokenizer))
    assert stop_token_ids(tokenizer) == stop_token_ids(plain)
    assert ChatTemplate.of(tokenizer).end_tokens == {ends, tokenizer.eos_token}


def test_tags_of_an_answer_that_are_special_tokens_are_these_tokens(shared):
    """The template finds them, as it strips earlier thoughts; in a question they stay text."""
    plain = tokenizer_of("hunyuan-7b", shared)
    tokenizer = all_special(plain, *TAGS)
    answers = [f"<think>\nwhy\n</think>\n<answer>\n{number}\n</answer>" for number in (1, 2)]
    first, second = ({"role": "assistant", "content": answer} for answer in answers)
    question = {"role": "user", "content": "What is <think>?"}
    record = {"messages": [question, first, question, second]}
    assert shown(record, tokenizer) == shown(record, plain)
    ids = encode(conversation(record), tokenizer, 1 << 12)["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<think>")) == 1
    assert ids.count(tokenizer.convert_tokens_to_ids("<|eos|>")) == 2


@pytest.mark.parametrize(
    ("answer", "call", "expected"),
    [
        # A tag that the template always writes, or that closes the answer, ends nothing.
        ("<think>\n\n</think>\n\n' + m.content + '<|im_end|>", "", {"<|im_end|>"}),
        ("<answer>' + m.content + '</answer><|im_end|>", "", {"<|im_end|>"}),
        # Calls that end with a token of their own, as in gpt-oss.
        ("' + m.content + '<|im_end|>", "<|call|>", {"<|im_end|>", "<|call|>"}),
        ("' + m.content + '</answer>\n<|im_end|>\n", "</tool_call>\n<|im_end|>", {"<|im_end|>"}),
    ],
)
@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("special", [True, False])
def test_end_tokens_of_templates_that_write_tags(chatml, monkeypatch, answer, call, expected, eos, special):
    names = ["<|im_end|>", "<|endoftext|>", "<|call|>", *TAGS]
    tokenizer = copy.deepcopy(chatml)
    tokenizer.add_tokens([AddedToken(name, special=special) for name in names], special_tokens=special)
    tokenizer.eos_token = eos
    calls = f"{{% if m.tool_calls %}}{{{{ 'call' + {json.dumps(call)} }}}}{{% else %}}" if call else "{% if true %}"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        + calls + "{{ '" + answer + "' }}{% endif %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )  # fmt: skip
    found = ChatTemplate.of(tokenizer).end_tokens
    assert found == expected | {eos}
    assert {tokenizer.decode([token]) for token in stop_token_ids(tokenizer)} == expected | {eos}
    exchange = [*EXCHANGE, *EXCHANGE]
    assert [text.endswith("<|im_end|>") for text in trained_texts({"messages": exchange}, tokenizer)] == [True, True]


QUIET = "<think>\n\n</think>\n"
# Its generation prompt opens a thought, or closes one with `enable_thinking: false`; so do the answers.
OPENS_THOUGHT = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\n<think>\n' }}"
    "{{- (m.reasoning_content or '') + '\n</think>\n' + m.content + '<|im_end|>' }}{%- else %}"
    "{{- '<|im_start|>user\n' + m.content + '<|im_end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '\n</think>\n' }}{%- endif %}{%- endif %}"
)


def test_enable_thinking_is_trained_in_the_form_in_which_the_model_is_asked(chatml, monkeypatch, tmp_path):
    monkeypatch.setattr(chatml, "chat_template", OPENS_THOUGHT)
    thinking = [EXCHANGE[0], EXCHANGE[1] | {"reasoning_content": "why"}]
    off, on = {"enable_thinking": False, "messages": EXCHANGE}, {"enable_thinking": True, "messages": thinking}
    assert trained_texts(off, chatml) == [f"{QUIET}a<|im_end|>"]
    assert trained_texts(on, chatml) == ["<think>\nwhy\n</think>\na<|im_end|>"]
    for record in (off, on):
        prompt = render_prompt(record["messages"][:1], chatml, {"enable_thinking": record["enable_thinking"]})
        whole = encode(conversation(record), chatml, 1 << 20)["input_ids"]
        assert chatml.decode(whole).startswith(chatml.decode(prompt))
    # Never lost silently: the trained text is the same without it.
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(off) + "\n")
    assert check_data(path, chatml, 99).ignored_fields == {"enable_thinking (in the prompt alone)": 1}
    with pytest.raises(
        DataError, match=r"does not render enable_thinking .* ends the prompt with '.*</think>.*message 2"
    ):
        shown(off | {"messages": thinking}, chatml)


@pytest.mark.parametrize("name", ["hunyuan-7b", "hunyuan-a13b"])
def test_enable_thinking_of_hunyuan(shared, name):
    tokenizer = tokenizer_of(name, shared)
    plain = trained_texts({"messages": EXCHANGE}, tokenizer)
    assert trained_texts({"messages": EXCHANGE, "enable_thinking": True}, tokenizer) == plain
    off = {"messages": EXCHANGE, "enable_thinking": False}
    with pytest.raises(DataError, match=r"does not render enable_thinking in what .* writes it only behind the last"):
        shown(off, tokenizer)
    # The answer begins as the prompt ends.
    begun = [EXCHANGE[0], EXCHANGE[1] | {"content": QUIET + "a"}]
    assert trained_texts(off | {"messages": begun}, tokenizer) == [f"{QUIET}a<|eos|>"]


@pytest.mark.parametrize("name", ["hunyuan-7b", "hy3"])
def test_an_empty_thought_name_or_id_is_the_same_as_none(shared, name):
    tokenizer = tokenizer_of(name, shared)
    empty = [EXCHANGE[0] | {"name": ""}, EXCHANGE[1] | {"reasoning_content": "", "thinking": "", "tool_call_id": ""}]
    assert shown({"messages": empty}, tokenizer) == shown({"messages": EXCHANGE}, tokenizer)


SOME_OF_TOOLS = (
    "{%- for tool in tools or [] %}{{- TOOL }}{%- endfor %}{%- for m in messages %}{{- '<|im_start|>' + m.role "
    "+ '\n' + (m.content or '') }}{%- for call in m.tool_calls or [] %}{{- CALL }}{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
WHOLE_TOOL, WHOLE_CALL = "tool | tojson", "call.function | tojson"


ARGUMENTS_AND_NAME = r"messages\[\].tool_calls\[\].function.arguments, messages\[\].tool_calls\[\].function.name,"


@pytest.mark.parametrize(
    ("tool", "call", "field"),
    [
        (WHOLE_TOOL, WHOLE_CALL, ""),
        (WHOLE_TOOL, "call.function.name", r"messages\[\].tool_calls\[\].function.arguments,"),
        (WHOLE_TOOL, "call.function.arguments.keys() | join", ARGUMENTS_AND_NAME),
        (WHOLE_TOOL, "call.function.arguments.city", ARGUMENTS_AND_NAME),
        (WHOLE_TOOL, "call.function | tojson if loop.first", r"messages\[\].tool_calls,"),
        (WHOLE_TOOL, "call.function | tojson if loop.last", r"messages\[\].tool_calls,"),
        ("tool.function.name + tool.function.description", WHOLE_CALL, r"tools\[\].parameters,"),
        ("tool.function.name", WHOLE_CALL, r"tools\[\].description, tools\[\].parameters,"),
        ("tool | tojson if loop.first", WHOLE_CALL, r"tools\[\].description, tools\[\].name, tools\[\].parameters,"),
        # Rewritten, but not lost.
        ("tool | tojson | upper", "call.function | tojson | upper", ""),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_parts_of_tools_and_calls_that_a_template_leaves_out_are_refused(
    chatml, monkeypatch, tool, call, field, as_json
):
    monkeypatch.setattr(chatml, "chat_template", SOME_OF_TOOLS.replace("TOOL", tool).replace("CALL", call))
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [
        {"type": "function", "function": {"name": name, "description": "some text", "parameters": parameters}}
        for name in ("weather", "time")
    ]
    # Values of which none is a text are replaced, where they are shown as they are.
    given = [{"city": "Paris", "days": 3}, {"city": "Rome", "days": 3}]
    calls = [
        {"type": "function", "function": {"name": "weather", "arguments": json.dumps(item) if as_json else item}}
        for item in given
    ]
    start, calling, result, end = WITH_TOOLS["messages"]
    messages = [start, calling | {"tool_calls": calls}, result, result, end]
    record = {"tools": tools, "messages": [{k: v for k, v in m.items() if k != "tool_call_id"} for m in messages]}
    if not field:
        assert len(trained_texts(record, chatml)) == 2
        return
    with pytest.raises(DataError, match=rf"does not render {field} so"):
        shown(record, chatml)


def parts(*pairs):
    return [{"type": kind, ("thinking" if kind == "thinking" else "text"): value} for kind, value in pairs]


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "a", "reasoning": "why"},
        {"content": "a", "thinking": "why"},
        {"content": "a", "reasoning": "why", "reasoning_content": "why"},
        {"content": parts(("thinking", "why"), ("text", "a"))},
        {"content": parts(("thinking", [{"type": "text", "text": "why"}]), ("output_text", "a"))},
    ],
)
def test_a_thought_in_any_spelling_is_the_same(shared, answer):
    tokenizer = tokenizer_of("hy3", shared)
    found = trained_texts({"messages": [EXCHANGE[0], {"role": "assistant"} | answer]}, tokenizer)
    assert found == ["<think:opensource>why</think:opensource>a<｜hy_eos:opensource｜>"]
    assert trained_texts({"instruction": "q", "output": "a", "reasoning_content": "why"}, tokenizer) == found


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"content": parts(("text", "a"), ("thinking", "why"))}, "part 2 of the content is a thought behind text"),
        (
            {"content": [{"type": "tool_use"}]},
            "part 1 of the content is of the type tool_use: write it as tool_calls",
        ),
        (
            {"content": [{"type": "image_url"}]},
            "part 1 of the content is of the type image_url: only text is trained",
        ),
        ({"content": ["a"]}, 'part 1 of the content must be an object such as {"type": "text"'),
        ({"content": parts(("thinking", "x"), ("text", "a")), "thinking": "y"}, "has one in a field of its own"),
        ({"content": "a", "reasoning": "x", "thinking": "y"}, "reasoning and thinking are different thoughts"),
        ({"content": "a", "weight": 0.5}, "weight says whether .* must be 1 or true, 0 or false; it is 0.5"),
        (
            {"content": "a", "loss": False, "train": True},
            "must be 1 or true, 0 or false, as train is true; it is fal",
        ),
    ],
)
def test_what_has_no_common_spelling_is_refused_by_name(answer, message):
    with pytest.raises(DataError, match=f"f.jsonl:3: message 2: .*{message}"):
        conversation({"messages": [EXCHANGE[0], {"role": "assistant"} | answer]})


def test_thoughts_where_no_template_reads_them_are_refused_with_advice(shared):
    tokenizer = tokenizer_of("hunyuan-7b", shared)
    with pytest.raises(
        DataError, match=r"does not render reasoning_content.* write a thought into its message as reas"
    ):
        shown({"reasoning_content": "why", "messages": EXCHANGE}, tokenizer)
    with pytest.raises(
        DataError, match=r"does not render messages\[\].thinking.* write the thought into the content"
    ):
        shown({"messages": [EXCHANGE[0], EXCHANGE[1] | {"thinking": "why"}]}, tokenizer)


@pytest.mark.parametrize("name", ["weight", "loss"])
def test_an_answer_that_is_not_to_be_trained_on_in_other_spellings(shared, name):
    tokenizer = tokenizer_of("hunyuan-7b", shared)
    for off, on in ((0, 1), (False, True)):
        messages = [
            EXCHANGE[0],
            EXCHANGE[1] | {name: off},
            EXCHANGE[0],
            {"role": "assistant", "content": "b", name: on},
        ]
        assert trained_texts({"messages": messages}, tokenizer) == ["b<|eos|>"]


# The answers of Qwen3's template: thoughts behind the last question alone, of which it strips white space.
QWEN3 = (
    "{%- set last = namespace(user=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- set content = m.content %}"
    "{%- if m.role == 'assistant' %}{%- set thought = m.reasoning_content or '' %}{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{%- if loop.index0 > last.user %}"
    "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{%- endif %}{%- endif %}"
    "{{- content + '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- endif %}"
)


def test_white_space_that_a_template_strips_at_thoughts_is_accepted_and_counted(
    chatml, monkeypatch, tmp_path, shared
):
    monkeypatch.setattr(chatml, "chat_template", QWEN3)
    whole = ["<think>\nwhy\n</think>\n\na<|im_end|>"]
    contents = ["<think>\nwhy\n</think>\n\na", "<think>\nwhy\n</think>\na", "<think>why</think>a", "why\n</think>\na"]
    records = [{"messages": [EXCHANGE[0], {"role": "assistant", "content": content}]} for content in contents]
    for record in records:
        assert trained_texts(record, chatml) == whole
    # An earlier answer is without its thought, whatever its white space.
    earlier = {"messages": [*records[1]["messages"], *records[0]["messages"]]}
    assert trained_texts(earlier, chatml) == ["a<|im_end|>", *whole]
    # The thought of a call in an earlier turn, beside a text or not.
    source = QWEN3.replace("content + '<|im_end|>\n'", "content + ('CALL' if m.tool_calls else '') + '<|im_end|>\n'")
    monkeypatch.setattr(chatml, "chat_template", source)
    for content in ("", "look"):
        calling = {"role": "assistant", "content": f"<think>\nwhich\n</think>\n{content}", "tool_calls": [CALL]}
        called = {"messages": [EXCHANGE[0], calling, WITH_TOOLS["messages"][2], EXCHANGE[1], *records[0]["messages"]]}
        found = trained_texts(called, chatml, allow_ignored_fields=True)
        assert found == [f"{content}CALL<|im_end|>", "a<|im_end|>", *whole]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "3 samples have answers in which white space beside <think> tags is" in check_data(path, chatml, 99).text()
    # Of Hy3, whose template writes a thought of its own, the content's stays text.
    report = check_data(path, tokenizer_of("hy3", shared), 99)
    assert "3 samples have answers with <think> in their content, which stays text" in report.text()
    assert not check_data(path, tokenizer_of("hunyuan-7b", shared), 99).notes


def test_a_conversation_that_begins_with_the_assistant(shared, chatml):
    opening = {"messages": [{"role": "assistant", "content": "hello"}, *EXCHANGE]}
    assert trained_texts(opening, chatml) == ["hello<|im_end|>", "a<|im_end|>"]
    assert "<|im_start|>assistant\n⟦hello" in shown(opening, chatml)
    with_system = {"tools": [TOOL], "messages": [{"role": "system", "content": "s"}, *opening["messages"]]}
    assert trained_texts(with_system, chatml) == trained_texts(opening, chatml)
    assert "<｜hy_Assistant:opensource｜>⟦<think:opensource></think:opensource>hello" in shown(
        opening, tokenizer_of("hy3", shared)
    )
    for name in ("hunyuan-7b", "hunyuan-a13b", "hunyuan-large"):
        # What the user's message ends with is what begins an answer: there is nothing to begin this one.
        with pytest.raises(
            DataError, match=r"f.jsonl:3: message 1: the chat template has no beginning for an assist"
        ):
            shown(opening, tokenizer_of(name, shared))


def test_several_system_messages_are_rendered_or_refused(shared, chatml):
    one, two = ({"role": "system", "content": content} for content in ("rule one", "rule two"))
    both, later = {"messages": [one, two, *EXCHANGE]}, {"messages": [one, *EXCHANGE, two, *EXCHANGE]}
    assert "rule one\n\nrule two<|extra_4|>" in shown(both, tokenizer_of("hunyuan-7b", shared))
    assert "rule one<|im_end|>\n<|im_start|>system\nrule two<|im_end|>" in shown(both, chatml)
    assert "⟦a<|im_end|>⟧\n<|im_start|>system\nrule two<|im_end|>" in shown(later, chatml)
    for tools in ({}, {"tools": [TOOL]}):
        for name in ("hunyuan-7b", "hy3"):
            with pytest.raises(DataError, match="writes the system's message 4 before the messages that it follows"):
                shown(later | tools, tokenizer_of(name, shared))
        with pytest.raises(DataError, match="writes the system's message 2 without a beginning or an end: join it"):
            shown(both | tools, tokenizer_of("hunyuan-a13b", shared))


def test_a_system_message_that_is_lost_is_refused_also_where_its_text_is_elsewhere(chatml, monkeypatch):
    source = "{% set s = messages | selectattr('role', 'equalto', 'system') | list %}{{ s[-1].content if s }}" + (
        QWEN_TOOLS.replace("messages %}", "messages if message.role != 'system' %}")
    )
    monkeypatch.setattr(chatml, "chat_template", source)
    both = [{"role": "system", "content": content} for content in ("im_start", "rule two")]
    for tools in ({}, {"tools": [TOOL]}):
        with pytest.raises(DataError, match="leaves out the system's message 1: join the system messages into one"):
            shown({"messages": [*both, *EXCHANGE]} | tools, chatml)
        assert "rule two" in shown({"messages": [both[1], *EXCHANGE]} | tools, chatml)


@pytest.mark.parametrize("found", [{"sky": "晴", "t": 3}, [{"t": 3}, None], 3, True])
def test_a_result_of_a_tool_that_is_not_text_is_rendered_as_json(shared, found):
    start, calling, result, end = WITH_TOOLS["messages"]
    texts = [
        shown(
            WITH_TOOLS | {"messages": [start, calling, result | {"content": content}, end]},
            tokenizer_of("hy3", shared),
        )
        for content in (found, json.dumps(found, ensure_ascii=False))
    ]
    assert texts[0] == texts[1]


def test_earlier_answers_that_end_with_another_token_are_refused_or_not_trained_on(chatml, monkeypatch):
    monkeypatch.setattr(
        chatml,
        "chat_template",
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + ('<|im_end|>' if loop.last else "
        "'<|im_start|>') }}{% else %}{{ m.content + '<|extra_0|>' }}{% endif %}{% endfor %}",
    )
    record = {"messages": [*EXCHANGE, *EXCHANGE]}
    message = (
        r"ends the answer of message 2 with '<\|im_start\|>', and the last answer .* split_turns: true or train_on"
    )
    for tools in ({}, {"reasoning_effort": "high"}):
        with pytest.raises(DataError, match=f"f.jsonl:3: .*{message}"):
            shown(record | tools, chatml, allow_ignored_fields=True)
        for options in ({"train_on_turns": "last"}, {"split_turns": True}):
            found = trained_texts(record | tools, chatml, allow_ignored_fields=True, **options)
            assert found == ["a<|im_end|>"]
    untrained = {"messages": [EXCHANGE[0], EXCHANGE[1] | {"train": False}, *EXCHANGE]}
    assert trained_texts(untrained, chatml) == ["a<|im_end|>"]


def test_arguments_of_calls_under_a_template_that_takes_text_alone(chatml, monkeypatch):
    """As in DeepSeek-R1's, which joins them to other texts."""
    source = QWEN_TOOLS.replace("(call.function.arguments | tojson)", "call.function.arguments")
    monkeypatch.setattr(chatml, "chat_template", source)
    texts = []
    for arguments in ({"city": "北京"}, '{"city": "北京"}'):
        call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
        texts.append(
            trained_texts(
                {"tools": [TOOL], "messages": [EXCHANGE[0], WITH_TOOLS["messages"][1] | {"tool_calls": [call]}]},
                chatml,
            )
        )
    assert texts[0] == texts[1] and '"arguments": {"city": "北京"}}' in texts[0][0]
