"""The estimates of memory that the notebook shows."""

from __future__ import annotations

import json

import pytest
from shown_html import make_config
from tiny import tiny_model

from hynb.plan import zero
from hynb.runs import BASE_IDENTITY
from hynb.widgets import memory_plan, preset_costs
from hynb.widgets.table import Table


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("costs") / "model")


def test_the_table_has_a_row_for_each_preset_and_highlights_the_chosen_one(model):
    table = preset_costs(make_config(model_name_or_path=str(model), deepspeed="ds_zero3_no_offload", use_lora=True))
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows] == list(zero.PRESETS)
    assert table.rows[table.chosen][0] == "ds_zero3_no_offload"
    assert table.title == "Estimated memory: model, LoRA of rank 64, 2048 tokens"
    assert preset_costs(make_config(model_name_or_path=str(model), deepspeed="my.json")).chosen is None


def test_the_parts_add_up_to_what_a_gpu_needs(model):
    table = memory_plan(make_config(model_name_or_path=str(model)))
    names = [row[0] for row in table.rows]
    assert names[0] == "weights" and names[table.chosen] == "each GPU, in total"
    assert names[-3:] == ["host memory: processes", "host memory", "a checkpoint on the disk"]


def test_why_there_is_no_estimate(model, tmp_path):
    assert preset_costs(make_config(model_name_or_path=str(tmp_path))).startswith("No estimate of what each preset")
    assert dict(memory_plan(make_config(model_name_or_path=str(tmp_path))).rows)["memory"].startswith("no estimate: ")
    own = memory_plan(make_config(model_name_or_path=str(model), deepspeed="my.json"))
    assert dict(own.rows)["memory"] == "no estimate: my.json is not one of the presets"


def test_a_run_that_resumes_is_estimated_from_the_base_of_its_checkpoint(model, tmp_path):
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()
    settings = {"base_model_name_or_path": str(model)}
    (checkpoint / "adapter_config.json").write_text(json.dumps(settings))
    config = make_config(model_name_or_path=None, resume_from_checkpoint=str(checkpoint), use_lora=True)
    expected = make_config(model_name_or_path=str(model), use_lora=True)
    assert preset_costs(config).rows == preset_costs(expected).rows
    (checkpoint / BASE_IDENTITY).write_text(json.dumps({"path": "/other", "hash": "other", "weight_bytes": 1}))
    assert "/other" in preset_costs(config)


def test_a_random_model_is_estimated_from_its_sizes(model):
    config = make_config(model_name_or_path=None, tokenizer_name_or_path=str(model))
    small, large = preset_costs(config), preset_costs(config.replace(num_layers=96))
    assert "a random model" in small.title and small.rows != large.rows
    assert preset_costs(config.replace(vocab_size=700)).rows == small.rows
