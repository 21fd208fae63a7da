"""ZeRO presets and DeepSpeed files, checked by DeepSpeed itself."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hynb.errors import ConfigError
from hynb.plan import zero


@pytest.mark.parametrize("name", zero.PRESETS)
@pytest.mark.parametrize("on_cpu", [True, False])
def test_deepspeed_accepts_every_preset(name, on_cpu):
    assert zero.problems(zero.for_machine(zero.build(name), on_cpu=on_cpu)) == []


def test_presets_have_the_names_and_stages_of_upstreams_training_guide():
    assert list(zero.PRESETS) == [
        "ds_zero2_no_offload",
        "ds_zero3_no_offload",
        "ds_zero3_offload",
        "ds_zero3_offload_no_auto",
    ]
    last = zero.build("ds_zero3_offload_no_auto")["zero_optimization"]
    assert not [key for key, value in last.items() if value == "auto"]
    for name, preset in zero.PRESETS.items():
        ds_config = zero.build(name)
        assert ds_config["zero_optimization"]["stage"] == preset.stage
        assert ("offload_param" in ds_config["zero_optimization"]) is preset.offload
        assert isinstance(ds_config["fp16"]["min_loss_scale"], int)


def test_the_file_name_of_a_preset_means_the_preset_unless_there_is_such_a_file(tmp_path):
    assert zero.load("ds_zero2_no_offload.json") == zero.build("ds_zero2_no_offload")
    path = tmp_path / "ds_zero2_no_offload.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert zero.load(str(path)) == {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    ("ds_config", "stage"),
    [
        (zero.build("ds_zero2_no_offload"), 2),
        (zero.build("ds_zero3_offload"), 3),
        ({}, 0),
        ({"zero_optimization": {}}, 0),
        ({"zero_optimization": []}, 0),
        ({"zero_optimization": {"stage": "two"}}, 0),
    ],
)
def test_the_stage_of_a_config_valid_or_not(ds_config, stage):
    assert zero.stage_of(ds_config) == stage


def test_a_config_for_a_cpu_needs_no_compiled_optimizer():
    ds_config = zero.build("ds_zero3_offload")
    before = json.dumps(ds_config)
    on_cpu = zero.for_machine(ds_config, on_cpu=True)
    assert "optimizer" in ds_config and "optimizer" not in on_cpu
    assert on_cpu["zero_force_ds_cpu_optimizer"] is False
    assert on_cpu["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": False}
    assert zero.for_machine(ds_config, on_cpu=False) == ds_config and json.dumps(ds_config) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1,}', ":1:9: invalid JSON"),
        (b'{\n "a": \n}', ":3:1: invalid JSON"),
        (b"\xff", "invalid UTF-8"),
        (b"[1]", ":1:1: must be a JSON object"),
    ],
)
def test_a_broken_file_is_named_with_line_and_column(tmp_path, text, message):
    path = tmp_path / "ds.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        zero.load(str(path))
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean ds_zero3_offload\?"):
        zero.load("ds_zero3_ofload")


@pytest.mark.parametrize(
    ("ds_config", "message"),
    [
        ({"zero_optimisation": {}}, "unknown key zero_optimisation (did you mean zero_optimization?)"),
        (
            {"zero_optimization": {"stage3_prefetch_bucket_siz": 1}},
            "unknown key zero_optimization.stage3_prefetch_bucket_siz (did you mean stage3_prefetch_bucket_size?)",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}},
            "unknown key zero_optimization.offload_param.devise (did you mean device?)",
        ),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage = 4"),
        ({"zero_optimization": {"stage": "two"}}, "zero_optimization.stage"),
        ({"zero_optimization": []}, "zero_optimization = []: must be an object"),
        ({"fp16": {"min_loss_scale": 1e-10}}, "fp16.min_loss_scale = 1e-10"),
        ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu = 0: must be a whole number ≥ 1"),
        ({"gradient_clipping": "much"}, 'gradient_clipping = "much": must be a number ≥ 0'),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled and bf16.enabled are both true"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param needs stage 3"),
    ],
)
def test_each_mistake_is_named(ds_config, message):
    assert any(message in problem for problem in zero.problems(ds_config))


def test_all_mistakes_at_once_without_torch_in_the_calling_process():
    ds_config = {
        "a": 1,
        "zero_optimization": {"b": 1, "stage": 9},
        "fp16": {"enabled": True},
        "bf16": {"enabled": True},
    }
    code = (
        "import json, sys; from hynb.plan import zero\n"
        f"print(json.dumps(zero.check({ds_config}, source='mine.json')))\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, torch_loaded = done.stdout.splitlines()
    assert json.loads(found) == [f"mine.json: {problem}" for problem in zero.problems(ds_config)]
    assert len(json.loads(found)) == 4 and torch_loaded == "False"


def test_a_schema_that_cannot_be_loaded_is_reported(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ConfigError, match=r"mine\.json: DeepSpeed's schema could not be loaded: no output"):
        zero.check({}, source="mine.json")
