"""Tiny random models of every supported family, with a tokenizer and data, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
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
# config.json of published models of each family, made small: their names of fields, and what other software reads.
_V1_ROPE = {"rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "mscale": 1.0}}
_CODE = {"AutoConfig": "configuration_hunyuan.HunYuanConfig", "AutoModelForCausalLM": "hunyuan.HunYuanForCausalLM"}
PUBLISHED = {
    "hunyuan": {
        "model_type": "hunyuan",
        "architectures": ["HunYuanForCausalLM"],
        "auto_map": _CODE,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "num_shared_expert": 1,
        **_V1_ROPE,
        **OF_FAMILY["hunyuan"],
    },
    # The fields of Hunyuan-A13B's older folders, with one entry per layer.
    "hunyuan-a13b": {
        "model_type": "hunyuan",
        "architectures": ["HunYuanMoEV1ForCausalLM"],
        "auto_map": _CODE,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "head_dim": None,
        "attention_head_dim": 8,
        "num_experts": 4,
        "intermediate_size": 64,
        "moe_intermediate_size": [48, 48, 48, 48],
        "moe_topk": [2, 2, 2, 2],
        "num_shared_expert": [1, 1, 1, 1],
        "moe_layer_num_skipped": 0,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "use_mixed_mlp_moe": True,
        "use_cla": False,
        "cla_share_factor": 2,
        "use_qk_norm": True,
        "use_mla": False,
        "group_limited_greedy": False,
        "mlp_bias": False,
        "org_vocab_size": 128167,
        "vit_path": None,
        **_V1_ROPE,
    },
    "hunyuan_v1_moe": {
        "model_type": "hunyuan_v1_moe",
        "architectures": ["HunYuanMoEV1ForCausalLM"],
        "auto_map": _CODE,
        "torch_dtype": "bfloat16",
        "use_qk_norm": True,
        **_V1_ROPE,
        **OF_FAMILY["hunyuan_v1_moe"],
        "moe_topk": [2, 2, 2, 2],
    },
    "hunyuan_v1_dense": {
        "model_type": "hunyuan_v1_dense",
        "architectures": ["HunYuanDenseV1ForCausalLM"],
        "torch_dtype": "bfloat16",
        "use_qk_norm": True,
        **_V1_ROPE,
    },
    "hy_v3": {
        "model_type": "hy_v3",
        "architectures": ["HYV3ForCausalLM"],
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "moe_router_use_sigmoid": True,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
        "rope_parameters": {"rope_theta": 11158840.0, "rope_type": "default"},
        **OF_FAMILY["hy_v3"],
    },
}


def published_model(folder: Path, name: str, *, seed: int = 0) -> Path:
    """Saves a tiny model as published ones are: bf16 with float32 routers, in two shards, with code in its folder.

    hy_v3 has an MTP layer after the others, and an expert bias that is not zero.
    """
    tokenizer = write_tokenizer(folder, vocab_size=700, samples=500)
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = SIZES | PUBLISHED[name] | ids | {"vocab_size": len(tokenizer), "initializer_range": 0.1}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for path in {entry.partition(".")[0] for entry in config.get("auto_map", {}).values()}:
        (folder / f"{path}.py").write_text("raise SystemExit('code of the model folder was run')\n")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.save_pretrained(folder / "written")
    weights = load_file(folder / "written" / "model.safetensors")
    for path in (folder / "written").iterdir():
        path.unlink()
    (folder / "written").rmdir()
    if config.get("num_nextn_predict_layers"):
        last = f"model.layers.{config['num_hidden_layers'] - 1}."
        mtp = {key.replace(last, last.replace("3", "4")): weight for key, weight in weights.items() if last in key}
        mtp |= {f"model.layers.4.{key}.weight": torch.randn(32, dtype=torch.bfloat16) for key in ("enorm", "hnorm")}
        weights |= mtp | {"model.layers.4.eh_proj.weight": torch.randn(32, 64, dtype=torch.bfloat16)}
    for key, weight in weights.items():
        if ".gate.w" in key or key.endswith("expert_bias"):
            weights[key] = weight.float() + torch.randn(weight.shape) / 10
        elif ".layers.4." in key:
            weights[key] = torch.randn_like(weight)
    keys, names = sorted(weights), [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    parts = dict(zip(names, (keys[: len(keys) // 2], keys[len(keys) // 2 :]), strict=True))
    for path, part in parts.items():
        save_file({key: weights[key] for key in part}, folder / path, {"format": "pt"})
    weight_map = {key: path for path, part in parts.items() for key in part}
    index = {"metadata": {"total_size": sum(weight.nbytes for weight in weights.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


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


def model_and_data(folder: Path) -> Path:
    """What a run needs: a dense model in `model`, and its data in `train.jsonl`."""
    tiny_model(folder / "model", "hunyuan_v1_dense")
    tiny_data(folder / "train.jsonl")
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
