"""Answers of a model, of an adapter with its base, and of the same model twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_data, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hynb.data import read_conversations, render_prompt
from hynb.errors import DataError, ModelError
from hynb.generate import AnsweringModel, answers, question_of


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny_data(tmp_path_factory.mktemp("data") / "data.jsonl")


@pytest.fixture(scope="module")
def questions(data) -> list:
    return [question_of(conversation) for conversation in read_conversations(data)][:3]


def test_batches_change_no_answer(model, questions):
    one_by_one = list(answers(model, questions, max_new_tokens=6))
    assert len(one_by_one) == 3 and all(item.text for item in one_by_one)
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


def test_generation_ends_at_the_templates_and_the_generation_configs_tokens(model, tmp_path):
    folder = copy_with(model, tmp_path, {"eos_token_id": [5, 9], "pad_token_id": 9})
    tokenizer = AutoTokenizer.from_pretrained(model)
    ends = [tokenizer.convert_tokens_to_ids(name) for name in ("<|eos|>", "<|endoftext|>")]
    assert set(AnsweringModel(folder).stops) == {*ends, 5, 9}


def test_an_output_that_is_cut_has_not_ended(model, questions, tmp_path):
    (cut,) = answers(model, questions[:1], max_new_tokens=2)
    assert not cut.ended
    prompt = torch.tensor([render_prompt(questions[0].messages, AutoTokenizer.from_pretrained(model))])
    first = int(AutoModelForCausalLM.from_pretrained(model)(prompt).logits[0, -1].argmax())
    (ended,) = answers(copy_with(model, tmp_path, {"eos_token_id": first}), questions[:1], max_new_tokens=2)
    assert ended.ended and ended.text == ""


def test_sampling_is_the_generation_configs_unless_greedy(model, questions, tmp_path):
    values = {"do_sample": True, "temperature": 3.0, "top_k": 0, "repetition_penalty": 1.5}
    folder = copy_with(model, tmp_path, values)
    plain = list(answers(model, questions, max_new_tokens=6))
    assert list(answers(folder, questions, max_new_tokens=6)) == plain
    sampled = [
        list(AnsweringModel(folder, greedy=False, seed=seed).answers(questions, max_new_tokens=6))
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2] and plain not in sampled
    one_choice = copy_with(model, tmp_path / "one", {"do_sample": True, "top_k": 1})
    assert list(AnsweringModel(one_choice, greedy=False).answers(questions, max_new_tokens=6)) == plain


def test_an_answer_is_streamed_as_it_is_returned(model, questions):
    pieces: list[tuple[str, str]] = []
    loaded = AnsweringModel(model)
    whole = loaded.stream(questions[0], max_new_tokens=6, show=lambda part, text: pieces.append((part, text)))
    assert [whole] == list(loaded.answers(questions[:1], max_new_tokens=6))
    assert {part for part, _ in pieces} == {"answer"} and "".join(text for _, text in pieces).strip() == whole.text
    assert len(pieces) > 1, "it is not shown at once"


def test_an_argument_that_the_template_does_not_read_is_refused(model, questions):
    question = replace(questions[0], arguments={"reasoning_effort": "high"})
    with pytest.raises(DataError, match=r"reasoning_effort: the chat template of .* does not read it"):
        next(answers(model, [question], max_new_tokens=1))


def copy_with(model: Path, parent: Path, generation: dict) -> Path:
    """A copy of a model with another generation_config.json."""
    folder = shutil.copytree(model, parent / "model")
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
