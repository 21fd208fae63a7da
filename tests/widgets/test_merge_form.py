"""The form of a merge."""

from __future__ import annotations

import dataclasses
import json

import pytest
from shown_html import make_config

from hynb.config import absolute_paths, to_yaml
from hynb.errors import ConfigError, ModelError, RunError
from hynb.widgets import MergeForm


@pytest.fixture
def lora_run(tmp_path):
    """The folder of a LoRA run, beside the one of a full fine-tuning."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    for name in ("train", "full"):
        folder = tmp_path / name
        for step in (5, 10):
            (folder / f"checkpoint-{step}").mkdir(parents=True)
            if name == "train":
                settings = json.dumps({"base_model_name_or_path": str(base)})
                (folder / f"checkpoint-{step}" / "adapter_config.json").write_text(settings)
        (folder / "run.yaml").write_text(to_yaml(absolute_paths(make_config(output_dir=str(folder)))))
    return tmp_path / "train"


def merge_form(run_dir, **changes):
    values = {"checkpoint": "last", "save_dtype": "keep", "output_path": "auto"} | changes
    return MergeForm(run_dir=str(run_dir), **values)


def test_run_checkpoint_and_dtype_are_chosen(lora_run):
    form = merge_form(lora_run)
    choice = form.value
    assert choice.adapter_model_path == str(lora_run / "checkpoint-10")
    assert choice.base_model_path == str(lora_run.with_name("base"))
    assert choice.output_path == str(lora_run.with_name("train-merged"))
    assert choice.train_data_file.endswith("data.jsonl")
    form.checkpoint.value, form.save_dtype.value = "checkpoint-5", "bf16"
    assert dataclasses.asdict(form.value) == dataclasses.asdict(choice) | {
        "adapter_model_path": str(lora_run / "checkpoint-5"),
        "save_dtype": "bf16",
    }
    form.run.value = str(lora_run.with_name("full"))
    with pytest.raises(RunError, match="has no LoRA checkpoint"):
        _ = form.value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"save_dtype": "int8"}, "save_dtype = 'int8': must be one of keep, bf16, fp16, fp32"),
        ({"checkpoint": "checkpoint-7"}, "its checkpoints: checkpoint-5, checkpoint-10"),
    ],
)
def test_values_that_do_not_exist_are_refused(lora_run, changes, message):
    with pytest.raises((ConfigError, RunError), match=message):
        merge_form(lora_run, **changes)


def test_other_runs_are_named_if_the_folder_has_none(lora_run):
    with pytest.raises(RunError, match=r"no run in .*nothing; runs in the same folder: (train, full|full, train)"):
        merge_form(lora_run.with_name("nothing"))


def test_a_base_that_is_missing_is_named(lora_run):
    form = merge_form(lora_run)
    (lora_run.with_name("base") / "config.json").unlink()
    with pytest.raises(ModelError, match=str(lora_run.with_name("base"))):
        _ = form.value
