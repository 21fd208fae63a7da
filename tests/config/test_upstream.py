"""The defaults of upstream's script for flags that are left out."""

from __future__ import annotations

import pytest
from transformers import TrainingArguments

from hynb.config import parameters, read_flags, use_upstream_defaults
from hynb.config.upstream import _TRAINING

GIVEN = "--model_name_or_path m --train_data_file d"


def read(words: str):
    reading = read_flags(words.split())
    use_upstream_defaults(reading)
    return reading, reading.config("here")


def test_the_defaults_of_transformers_own_flags_are_those_of_its_class():
    """`warmup_ratio`, of 0, exists in transformers 4 alone."""
    fields = TrainingArguments.__dataclass_fields__
    for name in _TRAINING.keys() - {"warmup_ratio"}:
        assert fields[name].default == _TRAINING[name], name
    assert fields["warmup_steps"].default == _TRAINING["warmup_ratio"] == 0


def test_flags_that_are_left_out_have_upstreams_defaults_and_a_note():
    reading, config = read(f"{GIVEN} --use_lora --max_steps 5")
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (64, 8, 0)
    assert (config.learning_rate, config.lr_scheduler_type, config.warmup_ratio) == (5e-5, "linear", 0)
    assert config.per_device_train_batch_size == 8
    assert config.given == {"model_name_or_path", "train_data_file", "use_lora", "max_steps"}
    assert reading.notes == [
        "flags that were left out have the defaults of upstream's script: learning_rate = 5e-05 (hynb's own: 1e-05), "
        "lr_scheduler_type = linear (hynb's own: cosine_with_min_lr), warmup_ratio = 0 (hynb's own: 0.01), "
        "per_device_train_batch_size = 8 (hynb's own: 1), lora_alpha = 8 (hynb's own: 128), "
        "lora_dropout = 0 (hynb's own: 0.05)",
        "left out, and different from upstream's script: deepspeed = ds_zero2_no_offload (upstream trains without "
        "DeepSpeed, with the same result and more memory); logging_steps = 1 (upstream has 500, and no curve before "
        "that; training is the same)",
    ]


def test_given_flags_stay_and_need_no_note():
    reading, config = read(
        f"{GIVEN} --use_lora --lora_alpha 16 --lora_dropout 0.1 --learning_rate 1e-3 --lr_scheduler_type cosine "
        "--warmup_ratio 0.1 --per_device_train_batch_size 2 --num_train_epochs 1 --deepspeed ds_zero3_offload "
        "--logging_steps 5"
    )
    assert (config.lora_alpha, config.lora_dropout, config.num_train_epochs) == (16, 0.1, 1)
    assert reading.notes == [] and reading.defaults == {}


def test_min_lr_that_is_left_out_is_not_upstreams_rising_rate():
    reading, config = read(f"{GIVEN} --lr_scheduler_type cosine_with_min_lr")
    assert config.min_lr is None and config.num_train_epochs == 3
    assert "min_lr = auto (a tenth of learning_rate; upstream's 0.01 is above most" in reading.notes[-1]
    assert "lora" not in "".join(reading.notes), "full fine-tuning has no adapter"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {"num_experts": 8, "moe_topk": 4, "moe_intermediate_size": None, "moe_layer_num_skipped": None}),
        ("--num_experts 2", {"num_experts": 2, "moe_topk": 2}),
        ("--moe_layer_num_skipped 2", {"moe_intermediate_size": 1536, "moe_layer_num_skipped": 2}),
        ("--moe_intermediate_size 64", {"moe_intermediate_size": 64, "moe_layer_num_skipped": 1}),
        ("--num_attention_heads 4", {"num_key_value_heads": None}),
    ],
)
def test_the_sizes_of_a_random_model(words, expected):
    reading, config = read(f"--tokenizer_name_or_path t --train_data_file d {words}")
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.tie_word_embeddings
    assert ("num_key_value_heads = auto" in reading.notes[-1]) is ("heads" in words)


def test_sizes_of_a_given_model_are_not_mentioned():
    reading, config = read(GIVEN)
    assert config.num_experts == next(item.default for item in parameters() if item.name == "num_experts")
    assert "num_experts" not in "".join(reading.notes)
