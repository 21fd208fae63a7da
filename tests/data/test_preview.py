"""Previews of a sample's tokens as text and HTML."""

from __future__ import annotations

import re

from tiny import ANSWER, QUESTION

from hynb.data import Conversation, as_html, as_text, encode


def test_the_preview_marks_what_is_trained_on(tokenizer):
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    sample = Conversation(messages=messages, source="x")
    assert as_text(sample, tokenizer, 100) == "<|startoftext|>question<|extra_0|>⟦answer<|eos|>⟧"
    assert "tokens are cut at max_seq_length = 4" in as_text(sample, tokenizer, 4)


def test_previews_mark_trained_tokens_by_colour_and_by_brackets(tokenizer):
    messages = [QUESTION | {"content": "<b>&车系"}, ANSWER | {"content": "奥迪 A4"}]
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
