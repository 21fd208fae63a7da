"""The demo's base model: of Hunyuan-Large's architecture, and reproducible by its script."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hynb.demo import write_tokenizer
from hynb.demo.pretrain import SIZES, pretrain
from hynb.demo.run import BASE
from hynb.hunyuan_large import HunYuanLargeForCausalLM


def test_the_base_model_is_small_and_has_hunyuan_larges_architecture():
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


def test_the_scripts_tokenizer_is_the_base_models(tmp_path):
    made = write_tokenizer(tmp_path)
    kept = AutoTokenizer.from_pretrained(BASE)
    text = "请提取下列文章中包含的车系：\n奥迪Q5L, a new Volvo Kelras"
    assert made.encode(text) == kept.encode(text)
    assert made.chat_template == kept.chat_template and len(made) == len(kept)


def test_a_few_steps_of_pretraining_are_saved(tmp_path):
    pretrain(tmp_path, steps=6, batch_size=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.hidden_size == SIZES["hidden_size"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for name, config in (("config.json", model.config), ("generation_config.json", model.generation_config)):
        assert config.pad_token_id == tokenizer.convert_tokens_to_ids("<|pad|>"), name
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|eos|>", "<|endoftext|>"])
