"""Tiny random models of every supported family, with a tokenizer and data, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hynb.hunyuan_large  # noqa: F401  registers the model with the Auto classes
from hynb.demo.pretrain import write_tokenizer
from hynb.demo.texts import car_samples, write_jsonl

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
OF_FAMILY = {
    "hunyuan": {
        "num_experts": 4,
        "moe_topk": 1,
        "use_cla": True,
        "cla_share_factor": 2,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "hunyuan_v1_dense": {},
    "hy_v3": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def tiny_model(folder: Path, model_type: str = "hunyuan", *, seed: int = 0, **sizes) -> Path:
    """Saves a model of about a hundred thousand weights, large enough for every part to affect the loss."""
    tokenizer = write_tokenizer(folder, vocab_size=700, samples=500)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
        **(SIZES | OF_FAMILY[model_type] | sizes),
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def with_code(folder: Path) -> Path:
    """Adds what upstream's model folders have: code, an auto_map, a generation config."""
    (folder / "modeling_hunyuan.py").write_text("raise SystemExit('code of the model folder was run')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_hunyuan.HunYuanForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 20, "do_sample": True}))
    return folder


def tiny_data(path: Path, count: int = 40) -> Path:
    """Writes conversations of different lengths."""
    write_jsonl(path, car_samples(count, 1, seed=3)[0])
    return path


QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def exchange(question: str, answer: str = "a") -> dict:
    """A record of training data with one question and one answer."""
    return {"messages": [QUESTION | {"content": question}, ANSWER | {"content": answer}]}


def write_lines(path: Path, *records: dict) -> Path:
    """Writes records as JSONL."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
