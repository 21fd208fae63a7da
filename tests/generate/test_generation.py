"""Answers of a model, of an adapter with its base, and of the same model twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_data, tiny_model
from transformers import AutoModelForCausalLM

from hynb.data import read_conversations
from hynb.errors import ModelError
from hynb.generate import answers, main, split_answer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny_data(tmp_path_factory.mktemp("data") / "data.jsonl")


@pytest.fixture(scope="module")
def questions(data) -> list[list[dict]]:
    return [split_answer(conversation.messages)[0] for conversation in read_conversations(data)][:3]


def test_batches_change_no_answer(model, questions):
    one_by_one = list(answers(model, questions, max_new_tokens=6))
    assert len(one_by_one) == 3 and all(one_by_one)
    assert list(answers(model, questions, max_new_tokens=6, batch_size=2)) == one_by_one


def test_an_adapter_answers_together_with_its_base(model, questions, tmp_path):
    plain = list(answers(model, questions, max_new_tokens=6))
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.mul_(50)
    adapted.save_pretrained(tmp_path)
    assert list(answers(tmp_path, questions, max_new_tokens=6)) != plain


def test_a_folder_that_is_not_a_model_is_named(tmp_path, questions):
    with pytest.raises(ModelError, match=r"neither config\.json nor adapter_config\.json"):
        next(answers(tmp_path, questions, max_new_tokens=1))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/no/such"}')
    with pytest.raises(ModelError, match="an adapter for the base /no/such, which is not there"):
        next(answers(tmp_path, questions, max_new_tokens=1))


def test_the_command_prints_each_models_answers(model, data, questions, tmp_path, capsys):
    assert main([str(model), str(model), "--questions", str(data), "--count=2", "--max_new_tokens=4"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("-> ") == 4 and printed.count(f"== {model}") == 2
    for messages, answer in zip(questions[:2], answers(model, questions[:2], max_new_tokens=4), strict=True):
        assert printed.count(f"{messages[-1]['content']}\n-> {answer}\n") == 2
    command = [sys.executable, "-m", "hynb.generate", str(tmp_path), "--questions", str(data)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "neither config.json" in done.stderr and "Traceback" not in done.stderr


def test_a_conversation_is_split_at_its_last_question():
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user", "assistant")]
    assert split_answer(turns) == (turns[:4], "a")
    assert split_answer(turns[:2]) == (turns[:2], "")
