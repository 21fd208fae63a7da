"""Contradictions between parameters."""

from __future__ import annotations

import pytest

from hynb.config import Config, check_config

GOOD = {"model_name_or_path": "/model", "train_data_file": "data.jsonl"}
RANDOM = {"model_name_or_path": None, "tokenizer_name_or_path": "/tokenizer"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_on_experts": True}, "lora_on_experts needs use_lora"),
        ({"lora_on_experts": True, "use_lora": True}, "lora_on_experts and lora_dropout = 0.05"),
        ({"packing": True, "group_by_length": True}, "packing and group_by_length are both on"),
        ({"use_flash_attn": True, "attention": "flex"}, "use_flash_attn is on and attention = flex"),
        ({"split_long_samples": True}, "split_long_samples needs packing"),
        ({"eval_data_file": "e.jsonl", "eval_split": 0.1}, "eval_data_file and eval_split = 0.1 are both given"),
        ({"eval_steps": 5}, "eval_steps = 5: there is nothing to evaluate on"),
        ({"hostfile": "hosts", "include": "a", "exclude": "b"}, "include and exclude are both given"),
        ({"include": "a"}, "include = a: needs a hostfile"),
        ({"hostfile": "hosts", "num_processes": 2}, "num_processes = 2 and hostfile are both given"),
        ({"model_name_or_path": None}, "model_name_or_path and tokenizer_name_or_path are both missing"),
        ({"train_data_file": None}, "train_data_file is missing"),
        ({"sequence_parallel_size": 2, "num_processes": 3}, "does not divide the run's 3 ranks; set it to 1 or 3"),
        ({"sequence_parallel_size": 2, "attention": "flex"}, "share a sequence under sdpa and flash only"),
        (
            {"sequence_parallel_size": 2, "training_args": {"label_smoothing_factor": 0.1}},
            "and label_smoothing_factor = 0.1: transformers would compute another loss",
        ),
        (
            {"training_args": {"parallelism_config": {"sp_size": 2}}},
            "parallelism_config: hynb sets up the ranks itself; leave it out. For GPUs that share each sequence set "
            "sequence_parallel_size",
        ),
        (
            {"sequence_parallel_size": 2, "training_args": {"average_tokens_across_devices": False}},
            "and average_tokens_across_devices = False: transformers would compute another loss",
        ),
        (RANDOM | {"hidden_size": 100, "num_attention_heads": 8}, "hidden_size = 100 is not a multiple of"),
        (
            RANDOM | {"num_attention_heads": 8, "num_key_value_heads": 3},
            "is not a multiple of num_key_value_heads = 3",
        ),
        (RANDOM | {"moe_topk": 2}, "moe_topk = 2 is above num_experts = 1"),
        (RANDOM | {"moe_layer_num_skipped": 1, "use_cla": True}, "use_cla belongs to Hunyuan-Large"),
        (RANDOM | {"moe_layer_num_skipped": 25}, "moe_layer_num_skipped = 25 is above num_layers = 24"),
    ],
)
def test_each_contradiction_is_named_alone(changes, message):
    (problem,) = check_config(Config(**(GOOD | changes)))
    assert message in problem
    assert check_config(Config(**GOOD)) == []


def test_the_heads_of_a_hy3_have_a_size_of_their_own():
    config = Config(**(GOOD | RANDOM | {"hidden_size": 100, "num_attention_heads": 8}))
    assert check_config(config.replace(moe_intermediate_size=16)) == []
