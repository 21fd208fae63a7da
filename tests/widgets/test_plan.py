"""DeepSpeed's configuration and the commands that a notebook shows before a run starts."""

from __future__ import annotations

import json
import shlex

import pytest
from shown_html import make_config
from tiny import tiny_data, tiny_model

from hynb.cli import read_config
from hynb.errors import ConfigError
from hynb.plan import zero
from hynb.widgets import deepspeed_plan
from hynb.widgets.plan import terminal_command


def test_the_command_gives_the_same_config_whatever_the_values_contain():
    config = make_config(
        output_dir="runs/with space $(touch x) 'quoted'",
        learning_rate=1.23456789e-5,
        lora_target_modules=["q_proj", "v_proj"],
        use_lora=True,
        training_args={"adam_beta2": 0.95},
    )
    words = shlex.split(terminal_command(config).replace("\\\n", " "))
    assert words[:2] == ["hynb", "launch"] and words[2::2] == ["--set"] * (len(words) // 2 - 1)
    assert read_config(None, words[3::2]) == config


def test_the_plan_shows_the_presets_configuration_and_both_commands(tmp_path):
    model, data = tiny_model(tmp_path / "model"), tiny_data(tmp_path / "data.jsonl", 4)
    config = make_config(model_name_or_path=str(model), train_data_file=str(data), output_dir=str(tmp_path / "run"))
    _, configuration, terminal, ranks = ("\n\n" + repr(deepspeed_plan(config))).split("\n\n# ")
    shown = json.loads(configuration.partition("\n")[2])
    assert shown["zero_optimization"]["stage"] == zero.PRESETS[config.deepspeed].stage == 2
    assert "hynb launch" in terminal and "deepspeed" in ranks
    assert not (tmp_path / "run").exists()


def test_the_plan_shows_a_file_as_the_run_will_use_it_with_a_note_per_change(tmp_path):
    model, data = tiny_model(tmp_path / "model"), tiny_data(tmp_path / "data.jsonl", 4)
    path = tmp_path / "ds.json"
    section = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}
    path.write_text(json.dumps({"fp16": {"enabled": "auto", "min_loss_scale": 1e-10}, "zero_optimization": section}))
    values = {"train_data_file": str(data), "output_dir": str(tmp_path / "run"), "deepspeed": str(path)}
    plan = deepspeed_plan(make_config(model_name_or_path=str(model), bf16=True, **values))
    _, configuration, notes, *commands = ("\n\n" + repr(plan)).split("\n\n# ")
    shown = json.loads(configuration.partition("\n")[2])
    assert shown["fp16"] == {"enabled": "auto"}
    assert shown["zero_optimization"] == section | {"stage3_gather_16bit_weights_on_model_save": True}
    assert notes.count(f"deepspeed = {path}: ") == 2 and len(commands) == 2
    assert "fp16.min_loss_scale = 1e-10 is left out, because fp16 is off" in notes
    assert "stage3_gather_16bit_weights_on_model_save: true is used" in notes


def test_everything_that_would_keep_the_run_from_starting_is_an_error(tmp_path):
    config = make_config(model_name_or_path=str(tmp_path / "no"), train_data_file=str(tmp_path / "no.jsonl"))
    with pytest.raises(ConfigError) as caught:
        deepspeed_plan(config.replace(output_dir=str(tmp_path / "run")))
    assert len(caught.value.problems) >= 2
