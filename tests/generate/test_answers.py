"""The questions that are put to models, and the folders that can be asked."""

from __future__ import annotations

import json
import sys

import pytest
from tiny import tiny_data, tiny_model

from hynb.errors import ModelError
from hynb.generate import answers, split_answer
from hynb.generate.answers import main


def test_the_command_prints_each_question_with_the_answer_of_the_model(tmp_path, monkeypatch, capsys):
    model, data = tiny_model(tmp_path / "model"), tiny_data(tmp_path / "data.jsonl")
    asked = [split_answer(json.loads(line)["messages"])[0] for line in data.read_text().splitlines()[:2]]
    monkeypatch.setattr(sys, "argv", ["ask", "--questions", str(data), "--count=2", "--max_new_tokens=4", str(model)])
    assert main() == 0
    printed = capsys.readouterr().out
    for messages, text in zip(asked, answers(model, asked, max_new_tokens=4), strict=True):
        assert f"{messages[-1]['content']}\n-> {text}\n" in printed
    assert printed.count("-> ") == 2


def test_a_folder_that_is_not_a_model_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"neither config\.json nor adapter_config\.json"):
        list(answers(tmp_path, [[{"role": "user", "content": "?"}]], max_new_tokens=1))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/no/such"}')
    with pytest.raises(ModelError, match="an adapter for the base /no/such, which is not there"):
        list(answers(tmp_path, [[{"role": "user", "content": "?"}]], max_new_tokens=1))


def test_a_conversation_is_asked_up_to_its_last_question():
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user", "assistant")]
    assert split_answer(turns) == (turns[:4], "a")
    assert split_answer(turns[:2]) == (turns[:2], "")
