"""The demo's texts and base model: nothing leaks, the task needs reading, the base is what its script says."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hynb.config import check_config
from hynb.data import check_data
from hynb.demo.pretrain import SIZES, pretrain, write_tokenizer
from hynb.demo.run import (
    BASE,
    HELD_OUT_SAMPLES,
    MOST_BEFORE,
    SEED,
    TRAIN_SAMPLES,
    _execute,
    _missed,
    demo_config,
    evaluate,
    write_demo,
)
from hynb.demo.texts import _CITIES, _PHONES, car_samples, pretraining_conversation, write_jsonl
from hynb.errors import RunFailedError
from hynb.hunyuan_large import HunYuanLargeForCausalLM


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("demo"), train=1500, held_out=200)


def parts(sample):
    return sample["messages"][1]["content"], sample["messages"][-1]["content"]


def test_held_out_cars_are_in_no_training_text():
    training, held = car_samples(TRAIN_SAMPLES, HELD_OUT_SAMPLES, seed=SEED)
    texts = "\n".join(parts(sample)[0] for sample in training)
    for sample in held:
        text, car = parts(sample)
        assert car not in texts
        assert car in text, "the answer stands in the text that is read"
    assert (training, held) == car_samples(TRAIN_SAMPLES, HELD_OUT_SAMPLES, seed=SEED)
    languages = {text[0].isascii() for text, _ in map(parts, held)}
    assert languages == {True, False}, "Chinese and English"


def test_no_rule_of_thumb_answers_the_questions():
    """Neither the first name in the text nor its place tells the answer: other things stand around it."""
    _, held = car_samples(100, 200, seed=1)
    places = []
    for text, car in map(parts, held):
        body = text.split("\n", 1)[1]
        places.append(body.index(car) / len(body))
        others = sum(word in body for kind in ("zh", "en") for word in _PHONES[kind] + _CITIES[kind])
        assert others + sum(mark in body for mark in ("日", "万", "euros")) + len(body) // 30 >= 1
    assert min(places) < 0.1 and max(places) > 0.6


def test_the_base_is_never_asked_for_a_car_in_its_pretraining():
    rng = random.Random(0)
    for _ in range(3000):
        question, _ = parts(pretraining_conversation(rng))
        assert "车系" not in question and "car series" not in question


def test_the_base_model_is_small_and_of_hunyuan_larges_architecture():
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 5e6
    config = json.loads((BASE / "config.json").read_text())
    for name, value in SIZES.items():
        assert config[name] == value, name
    assert config["model_type"] == "hunyuan"
    model = AutoModelForCausalLM.from_pretrained(BASE)
    assert type(model) is HunYuanLargeForCausalLM
    weights = load_file(BASE / "model.safetensors")
    router = {name: weight.dtype for name, weight in weights.items() if ".gate.wg." in name}
    assert set(router.values()) == {torch.float32}
    assert {weight.dtype for name, weight in weights.items() if name not in router} == {torch.bfloat16}


def test_the_base_models_tokenizer_is_what_its_script_makes(tmp_path):
    made = write_tokenizer(tmp_path)
    kept = AutoTokenizer.from_pretrained(BASE)
    text = "请提取下列文章中包含的车系：\n奥迪Q5L, a new Volvo Kelras"
    assert made.encode(text) == kept.encode(text)
    assert made.chat_template == kept.chat_template and len(made) == len(kept)


def test_a_step_of_pretraining_runs_and_saves(tmp_path):
    pretrain(tmp_path, steps=6, batch_size=2)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.hidden_size == SIZES["hidden_size"]


def test_the_data_is_good_and_the_config_too(files, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(files.base_model_path)
    config = demo_config(files, tmp_path / "run")
    assert check_data(files.train_data_file, tokenizer, config.max_seq_length).samples == 1500
    assert check_config(config) == []


def test_the_base_can_read_but_does_not_know_the_task(files, tmp_path):
    """What it was pretrained for it mostly does; the demo's question it doesn't understand."""
    rng = random.Random(11)
    known = [pretraining_conversation(rng) for _ in range(150)]
    asked = [sample for sample in known if len(parts(sample)[1]) < 15][:50]
    write_jsonl(tmp_path / "known.jsonl", asked)
    assert evaluate(files.base_model_path, tmp_path / "known.jsonl").exact_match > 0.5
    assert evaluate(files.base_model_path, files.held_out_file, limit=50).exact_match < MOST_BEFORE


def test_what_the_demo_must_show():
    good = {"exact_match": {"base": 0.0, "adapter": 0.9, "merged": 0.9}, "merged_equals_adapter": True}
    assert _missed(good) == []
    for wrong in (
        {"exact_match": {"base": 0.2, "adapter": 0.9, "merged": 0.9}},
        {"exact_match": {"base": 0.0, "adapter": 0.7, "merged": 0.7}},
        {"merged_equals_adapter": False},
    ):
        assert len(_missed(good | wrong)) == 1


def test_a_failed_notebook_fails_the_demo(tmp_path):
    with pytest.raises(RunFailedError, match=r"01_setup_cluster\.ipynb"):
        _execute("01_setup_cluster", tmp_path, {"no_such_parameter": 1})
