"""Thought and answer apart, whichever spelling the template has, whole and while the output is written."""

from __future__ import annotations

import re

import pytest

from hynb.generate import shown_answer, shown_message
from hynb.generate.answer import AnswerStream, make_answer, opens_thought, split_thought

# Output, whether the prompt opened the thought, thought, answer.
OUTPUTS = [
    ("2", False, "", "2"),
    ("<think>\nadd\n</think>\n<answer>\n2\n</answer>", False, "add", "2"),
    ("<think:opensource>add</think:opensource>2", False, "add", "2"),
    ("add</think:opensource>2", True, "add", "2"),
    ("<think:opensource></think:opensource><think>\nadd\n</think>\n<answer>\n2\n</answer>", False, "add", "2"),
    ("<think>\n\n</think>\n2 < 3 and 4 > 3", False, "", "2 < 3 and 4 > 3"),
    ("<think>never ends", False, "never ends", ""),
    ("the tag <think> is text here</think>", False, "", "the tag <think> is text here</think>"),
]


@pytest.mark.parametrize(("output", "opened", "thought", "answer"), OUTPUTS)
def test_an_output_is_divided(output, opened, thought, answer):
    assert split_thought(output, opened=opened) == (thought, answer)
    found = make_answer(output, ended=False, opened=opened)
    assert (found.thought, found.text, found.raw, found.ended) == (thought, answer, output, False)


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(("output", "opened", "thought", "answer"), OUTPUTS[:-1])
def test_a_stream_is_divided_in_the_same_way(output, opened, thought, answer, size):
    stream = AnswerStream(re.compile(r"<\|eos\|>"), opened=opened)
    pieces = [output[start : start + size] for start in range(0, len(output), size)] + ["<|eo", "s|>"]
    parts = [part for piece in pieces for part in stream.feed(piece)] + list(stream.feed("", last=True))
    texts = {name: "".join(text for part, text in parts if part == name).strip() for name in ("thought", "answer")}
    assert texts["thought"] == thought
    assert texts["answer"] == answer


def test_the_prompt_may_open_the_thought():
    assert opens_thought("<|assistant|><think:opensource>") and opens_thought("…<think>\n")
    assert not opens_thought("<think></think>") and not opens_thought("what is <think> for?")


def test_what_a_table_shows():
    assert shown_answer(make_answer("2", ended=True)) == "2"
    assert shown_answer(make_answer("<think>add</think>2", ended=True)) == "thought: add\nanswer: 2"
    assert shown_answer(make_answer("<think>add", ended=False)) == "thought: add\nanswer: (none)"
    assert shown_message({"content": "<think>add</think>2"}) == "thought: add\nanswer: 2"
    assert shown_message({"content": "2", "reasoning_content": "add"}) == "thought: add\nanswer: 2"
    call = {"function": {"name": "f", "arguments": {"a": "北京"}}}
    assert shown_message({"content": None, "tool_calls": [call]}) == '{"name": "f", "arguments": {"a": "北京"}}'
