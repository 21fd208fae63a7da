"""Reading of flags, YAML and notebook values: every mistake at once, with its location and the nearest valid name."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hynb.config import (
    Config,
    Parameter,
    Reading,
    load_yaml,
    parameters,
    read_flags,
    read_mapping,
    read_settings,
    read_yaml,
    to_yaml,
)
from hynb.config.reading import training_argument_types
from hynb.config.schema import parameter
from hynb.errors import ConfigError

GOOD = {"model_name_or_path": "/model", "train_data_file": "data.jsonl"}


def problems_of(reading: Reading) -> str:
    with pytest.raises(ConfigError) as caught:
        reading.config("here")
    return str(caught.value)


# The flags of upstream's training guide and train.sh.
UPSTREAM_FLAGS = """--do_train --model_name_or_path /m --tokenizer_name_or_path /t --train_data_file d.jsonl
--deepspeed ds_zero3_offload --output_dir out --overwrite_output_dir --per_device_train_batch_size 2
--gradient_accumulation_steps 4 --gradient_checkpointing --lr_scheduler_type cosine_with_min_lr
--logging_steps 1 --max_steps 200 --save_steps 100 --learning_rate 1e-5 --min_lr 1e-6 --warmup_ratio 0.01
--save_strategy steps --save_safetensors False --use_lora --lora_rank 64 --lora_alpha 128
--lora_dropout 0.05 --use_flash_attn --make_moe_param_leaf_module --model_max_length 4096
--max_seq_length 4096 --bf16 --hidden_size 256 --intermediate_size 512 --num_layers 4
--num_attention_heads 8 --num_key_value_heads 4 --num_experts 16 --moe_topk 1 --use_cla
--cla_share_factor 2 --use_mixed_mlp_moe --num_shared_expert 1 --use_qk_norm --tie_word_embeddings"""


def test_upstreams_flags_are_all_parameters():
    reading = read_flags(["--local_rank=1", *UPSTREAM_FLAGS.split()])
    config = reading.config("command line")
    assert (config.min_lr, config.learning_rate, config.warmup_ratio) == (1e-6, 1e-5, 0.01)
    assert (config.use_lora, config.bf16, config.fp16, config.save_safetensors) == (True, True, False, False)
    assert (config.num_experts, config.use_cla, config.tie_word_embeddings) == (16, True, True)
    assert config.training_args == {}
    names = {word.split("=")[0][2:] for word in UPSTREAM_FLAGS.split() if word.startswith("--")}
    assert names == config.given
    for name in ("train_attention_params_only", "resume_from_checkpoint", "fp16"):
        assert parameter(name).name == name


def test_other_training_arguments_pass_with_their_types():
    words = "--adam_beta2 0.95 --dataloader_prefetch_factor 2 --torch_compile --optim adamw_torch --tf32 false"
    config = read_flags([*words.split(), "--train_data_file=d", "--model_name_or_path=m"]).config("x")
    assert config.training_args == {
        "adam_beta2": 0.95,
        "dataloader_prefetch_factor": 2,
        "torch_compile": True,
        "optim": "adamw_torch",
        "tf32": False,
    }
    assert "learning_rate" in training_argument_types()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rat", "1e-5"], "learning_rat (did you mean learning_rate?)"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size = 0: must be ≥ 1"),
        (["--max_steps", "ten"], "max_steps is 'ten'; it takes a whole number"),
        (["--max_steps"], "--max_steps is given without a value"),
        (["--bf16", "--fp16"], "bf16 and fp16 are both on"),
        (["--bf16", "maybe"], "it takes true or false"),
        (["--min_lr", "1e-3", "--learning_rate", "1e-5"], "min_lr = 0.001 is above learning_rate"),
        (["--learning_rate", "nan"], "learning_rate = nan"),
        (["--lr_scheduler_type", "cosin"], "did you mean cosine?"),
        (["--save_strategy", "best"], "must be one of steps, epoch, no"),
        (["--lora_target_modules", ","], "must name at least one"),
        (["--adam_beta2", "x"], "adam_beta2 is 'x'; it takes a number"),
        (["--adam_beto2", "0.9"], "did you mean adam_beta2?"),
        (["--use_lora", "--train_attention_params_only"], "choose one"),
        (["stray"], "'stray' is not a flag"),
        (["--do_train", "false"], "there is nothing to do"),
        (["--learning_rate", "1" * 400], "learning_rate = inf: must be > 0 and ≤ 10"),
        (["--dataloader_num_workers", "2.5"], "dataloader_num_workers is '2.5'; it takes a whole number"),
        (["--lr_scheduler_kwargs", "{a"], "lr_scheduler_kwargs is '{a', which is invalid YAML"),
        (["--train_data_files"], "unknown parameter train_data_files (did you mean train_data_file?)"),
    ],
)
def test_each_mistake_is_named(words, message):
    good = [word for name, value in GOOD.items() for word in (f"--{name}", value)]
    assert message in problems_of(read_flags([*words, *good]))


def test_all_mistakes_come_at_once_with_their_lines(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "# a comment\nlearning_rat: 1\nmax_steps: ten\nper_device_train_batch_size: 0\nmax_steps: 3\n"
        "bf16: true\nfp16: true\n[a]: 1\nseed: !!python/object:os.system {}\noutput_dir: 2026-13-45\n"
    )
    message = problems_of(read_yaml(path))
    assert f"{path}:2: unknown parameter learning_rat" in message
    assert f"{path}:3: max_steps is 'ten'" in message
    assert f"{path}:5: max_steps is given twice, first in line 3" in message
    assert f"{path}:8: a key must be the name of a parameter" in message
    assert f"{path}:9: seed has an invalid YAML value: could not determine a constructor" in message
    assert f"{path}:10: output_dir has an invalid YAML value: month must be in 1..12" in message
    for more in ("per_device_train_batch_size = 0", "bf16 and fp16", "train_data_file is missing"):
        assert more in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: [1\n", "invalid YAML"),
        (b"- 1\n", ":1: must be a mapping"),
        (b"a: b: c\n", ":1: invalid YAML"),
        (b"\xff", "cannot be read as UTF-8 text"),
    ],
)
def test_a_file_that_is_not_a_yaml_mapping_is_named(tmp_path, text, message):
    (tmp_path / "run.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        load_yaml(tmp_path / "run.yaml")


def test_the_message_for_a_missing_file_tells_how_to_write_one(tmp_path):
    with pytest.raises(ConfigError, match="hynb parameters --yaml"):
        load_yaml(tmp_path / "no.yaml")


def values_of(item: Parameter) -> st.SearchStrategy:
    if item.choices:
        base = st.sampled_from(item.choices)
    elif item.type is bool:
        base = st.booleans()
    elif item.type is int:
        base = st.integers(int(item.minimum or 0), int(item.maximum or 10**9))
    elif item.type is float:
        low = item.minimum if item.minimum is not None else (item.above or 0) + 1e-9
        base = st.floats(low, item.maximum or 1e6)
    elif item.type is list:
        base = st.lists(st.from_regex(r"[a-z_]{1,12}", fullmatch=True), min_size=1, max_size=4)
    else:
        base = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1).filter(
            lambda text: text != "auto"
        )
    return st.none() | base if item.optional else base


# A busy machine is not a failure.
@settings(deadline=None)
@given(st.data())
def test_yaml_reads_back_what_it_wrote(tmp_path_factory, data):
    values = {item.name: data.draw(values_of(item), label=item.name) for item in parameters()}
    config = Config(**values, training_args={"adam_beta2": 0.95})
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    path.write_text(to_yaml(config, explain=True), encoding="utf-8")
    reading = read_yaml(path)
    assert reading.problems == []
    assert Config(**reading.values, training_args=reading.training_args) == config


def test_a_notebooks_plain_values_are_read():
    values = GOOD | {
        "max_steps": "auto",
        "min_lr": "",
        "lora_target_modules": "q_proj, v_proj",
        "bf16": "True",
    }
    config = read_mapping(values).config("notebook")
    assert (config.max_steps, config.min_lr, config.bf16) == (None, None, True)
    assert config.lora_target_modules == ["q_proj", "v_proj"]


def test_settings_override_a_file(tmp_path):
    (tmp_path / "a.yaml").write_text("model_name_or_path: m\ntrain_data_file: d\nlearning_rate: 1e-4\n")
    reading = read_settings(read_yaml(tmp_path / "a.yaml"), ["learning_rate=2e-4", "max_steps=7"])
    config = reading.config("x")
    assert (config.learning_rate, config.max_steps) == (2e-4, 7)
    assert "--set max_steps: must be key=value" in problems_of(read_settings(read_mapping(GOOD), ["max_steps"]))


def test_outdated_flags_are_renamed_or_ignored_with_a_note():
    words = "--evaluation_strategy no --logging_dir x --no_cuda --fp16_opt_level O1 --push_to_hub --use_mps_device"
    reading = read_flags(words.split())
    assert reading.training_args == {"eval_strategy": "no", "use_cpu": True}
    assert reading.problems == []
    assert [note.split(" is ")[0] for note in reading.notes] == [word[2:] for word in words.split() if "--" in word]
    assert "evaluation_strategy is now called eval_strategy" in reading.notes
    assert "push_to_hub is ignored: hynb uploads nothing" in reading.notes


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("adam_beta2", 1, 1.0),
        ("dataloader_prefetch_factor", "none", None),
        ("dataloader_prefetch_factor", None, None),
        ("dataloader_prefetch_factor", "4", 4),
        ("eval_on_start", "yes", True),
        ("label_names", "a, b", ["a", "b"]),
        ("lr_scheduler_kwargs", "{num_cycles: 2}", {"num_cycles": 2}),
        ("lr_scheduler_kwargs", {"num_cycles": 2}, {"num_cycles": 2}),
        ("optim_args", "a=1,b=2", "a=1,b=2"),
        ("include_num_input_tokens_seen", "true", True),
    ],
)
def test_training_arguments_get_the_type_of_their_annotation(name, value, expected):
    read = read_mapping({name: value})
    assert read.problems == []
    assert read.training_args[name] == expected and type(read.training_args[name]) is type(expected)


def test_training_arguments_of_a_wrong_type_are_refused():
    read = read_mapping({"adam_beta2": True, "dataloader_num_workers": "x", "eval_on_start": 3})
    assert read.problems == [
        "parameters: adam_beta2 is True; it takes a number",
        "parameters: dataloader_num_workers is 'x'; it takes a whole number",
        "parameters: eval_on_start is 3; it takes true or false",
    ]
