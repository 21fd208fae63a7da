"""ZeRO presets and DeepSpeed files, upstream's among them, checked by DeepSpeed itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHARED
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from transformers import TrainingArguments
from transformers.integrations import HfTrainerDeepSpeedConfig

from hynb.config import Config
from hynb.errors import ConfigError
from hynb.plan import zero

UPSTREAM_FILES = sorted(SHARED.glob("models/*/ds_*.json"))


@pytest.mark.parametrize("name", zero.PRESETS)
@pytest.mark.parametrize("on_cpu", [True, False])
def test_deepspeed_accepts_every_preset(name, on_cpu):
    assert zero.problems(zero.for_machine(zero.build(name), on_cpu=on_cpu)) == []


def test_presets_have_the_names_and_stages_of_upstreams_training_guides():
    assert list(zero.PRESETS) == [
        "ds_zero2_no_offload",
        "ds_zero2_offload",
        "ds_zero3_no_offload",
        "ds_zero3_optimizer_offload",
        "ds_zero3_offload_no_auto",
        "ds_zero3_param_offload",
        "ds_zero3_offload",
    ]
    fixed = zero.build("ds_zero3_offload_no_auto")["zero_optimization"]
    assert not [key for key, value in fixed.items() if value == "auto"]
    for name, preset in zero.PRESETS.items():
        ds_config = zero.build(name)
        assert ds_config["zero_optimization"]["stage"] == preset.stage
        for part in ("offload_optimizer", "offload_param"):
            assert (part in ds_config["zero_optimization"]) is getattr(preset, part)
        # On a GPU DeepSpeed's CPU optimizer updates what is in host memory, and nothing else.
        assert ("optimizer" in ds_config) is preset.offload_optimizer
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
        (b'{"fp16": {"enabled": true, "enabled": false}}', ": 'enabled' is given twice in one object"),
        (b'{"steps_per_print": ' + b"9" * 400 + b"}", ": 999999999999…: has 400 digits; write a smaller number"),
    ],
)
def test_a_broken_file_is_named_with_line_and_column(tmp_path, text, message):
    path = tmp_path / "ds.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        zero.load(str(path))
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)


@pytest.mark.parametrize("name", ["ds_zero2_offload", "ds_zero3_optimizer_offload", "ds_zero3_param_offload"])
def test_a_preset_of_upstreams_hy3_folder_has_the_effect_of_its_file(name, shared):
    """As DeepSpeed reads both; what is left to "auto" is filled in from the same values of the run."""
    upstream = json.loads((shared / "models" / "hy3" / f"{name}.json").read_text())
    preset = zero.build(name)
    models = {"zero_optimization": DeepSpeedZeroConfig, "fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config}
    for section, model in models.items():
        ours, theirs = preset.pop(section), upstream.pop(section)
        automatic = [{key for key, value in part.items() if value == "auto"} for part in (ours, theirs)]
        assert automatic[0] == automatic[1] and model(**ours) == model(**theirs), section
    # How often DeepSpeed prints its own line; and its CPU optimizer, which accelerate chooses for upstream's files.
    assert preset.pop("steps_per_print") != upstream.pop("steps_per_print")
    assert ("optimizer" in preset) is ("optimizer_offload" in name or name == "ds_zero2_offload")
    preset.pop("optimizer", None)
    assert preset == upstream


# Where a preset differs from upstream's files: what the run's own parameters decide, as upstream's scripts pass them;
# a value that DeepSpeed refuses; and how often DeepSpeed prints its own line.
DECIDED_BY_THE_RUN = {
    "bf16.enabled",
    "fp16.enabled",
    "gradient_accumulation_steps",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
}


def leaves(ds_config: dict, path: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in ds_config.items():
        found |= leaves(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


@pytest.mark.parametrize("name", ["ds_zero2_no_offload", "ds_zero3_offload_no_auto"])
def test_a_preset_equals_upstreams_file_of_hunyuan_large_key_by_key(name, shared):
    """Hunyuan-7B, A13B and Hy3 have the same files; Hy-MT2's ds_zero2_no_offload differs in fp16, which is off."""
    preset = zero.build(name)
    preset.pop("optimizer", None)
    ours = leaves(preset)
    theirs = leaves(json.loads((shared / "models" / "hunyuan-large" / f"{name}.json").read_text()))
    different = {key for key in ours | theirs if ours.get(key, "absent") != theirs.get(key, "absent")}
    assert {ours[key] for key in different & DECIDED_BY_THE_RUN} == {"auto"}
    rest = {key: (ours.get(key), theirs.get(key)) for key in different - DECIDED_BY_THE_RUN}
    assert rest.pop("steps_per_print") == (1e9, 10)
    if name == "ds_zero2_no_offload":
        assert rest.pop("fp16.min_loss_scale") == (1, 1e-10)
    assert rest == {}
    for folder in ("hunyuan-7b", "hunyuan-a13b", "hy3"):
        path = shared / "models" / folder / f"{name}.json"
        assert not path.exists() or leaves(json.loads(path.read_text())) == theirs, path


def accepted_by_deepspeed(ds_config: dict, config: Config, folder: Path) -> DeepSpeedConfig:
    """What DeepSpeed reads when a run of transformers has filled in its values; raises what DeepSpeed raises."""
    arguments = TrainingArguments(
        output_dir=str(folder), bf16=config.bf16, fp16=config.fp16, per_device_train_batch_size=1, use_cpu=True
    )
    filled = HfTrainerDeepSpeedConfig(ds_config)
    filled.trainer_config_process(arguments)
    assert filled.mismatches == []
    return DeepSpeedConfig({key: value for key, value in filled.config.items() if key != "train_batch_size"})


@pytest.mark.skipif(not UPSTREAM_FILES, reason="no upstream files beside the checkout")
@pytest.mark.parametrize("path", UPSTREAM_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_deepspeed_accepts_each_upstream_file_in_bf16(path, tmp_path):
    config = Config(bf16=True)
    ds_config = zero.load(str(path))
    assert zero.problems(ds_config, config.deepspeed_values()) == []
    corrected, notes = zero.correct(ds_config, config.deepspeed_values())
    invalid = ds_config["fp16"].get("min_loss_scale") == 1e-10
    assert [note.split(":")[0] for note in notes] == (
        ["fp16.min_loss_scale = 1e-10 is left out, because fp16 is off"] if invalid else []
    )
    assert ds_config["fp16"].get("min_loss_scale") == corrected["fp16"].pop(
        "min_loss_scale", 1e-10 if invalid else None
    )
    ds_config["fp16"].pop("min_loss_scale", None)
    assert corrected == ds_config, "everything else stays as it is in the file"
    read = accepted_by_deepspeed(zero.correct(zero.load(str(path)), config.deepspeed_values())[0], config, tmp_path)
    assert read.zero_config.stage == zero.stage_of(ds_config) and not read.float16_config.enabled


@pytest.mark.skipif(not UPSTREAM_FILES, reason="no upstream files beside the checkout")
@pytest.mark.parametrize("path", UPSTREAM_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_each_upstream_file_in_fp16_is_accepted_or_refused_by_name(path, tmp_path):
    """Invalid values that have an effect are refused, and a precision that the file fixes."""
    config = Config(fp16=True)
    ds_config = zero.load(str(path))
    found = zero.problems(ds_config, config.deepspeed_values())
    wanted = []
    if ds_config["fp16"].get("min_loss_scale") == 1e-10:
        wanted.append("fp16.min_loss_scale = 1e-10: Input should be a valid integer")
    if ds_config["fp16"]["enabled"] is False:
        wanted.append('fp16.enabled = false, but the run has true: set it to "auto", or change the run')
    if ds_config.get("bf16", {}).get("enabled") is True:
        wanted.append('bf16.enabled = true, but the run has false: set it to "auto", or change the run')
    assert len(found) == len(wanted)
    assert all(message.startswith(start) for message, start in zip(found, wanted, strict=True)), found
    if wanted:
        with pytest.raises((AssertionError, ValueError)):
            accepted_by_deepspeed(ds_config, config, tmp_path)
    else:
        assert accepted_by_deepspeed(ds_config, config, tmp_path).float16_config.enabled


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"enabled": True, "min_loss_scale": 1e-10}, "fp16.min_loss_scale = 1e-10"),
        ({"enabled": "auto", "loss_scal": 1}, "unknown key fp16.loss_scal (did you mean loss_scale?)"),
        ({"enabled": "sometimes", "min_loss_scale": 1e-10}, 'fp16.enabled = "sometimes"'),
        ([], "fp16 = []: must be an object"),
    ],
)
def test_what_has_an_effect_or_is_unknown_is_refused_in_a_precision_that_is_off_too(section, problem):
    found = zero.problems({"fp16": section}, Config(bf16=True).deepspeed_values())
    assert any(message.startswith(problem) for message in found), found


def test_invalid_values_without_effect_are_left_out_with_a_note_each():
    ds_config = {"fp16": {"enabled": "auto", "min_loss_scale": 0.5, "hysteresis": "x", "loss_scale_window": 7}}
    corrected, notes = zero.correct(ds_config, Config(bf16=True).deepspeed_values())
    assert corrected == {"fp16": {"enabled": "auto", "loss_scale_window": 7}}
    assert [note.split(" is left")[0] for note in notes] == ['fp16.hysteresis = "x"', "fp16.min_loss_scale = 0.5"]
    assert zero.correct(ds_config, {}) == (ds_config, []), "the precision is unknown"
    assert zero.correct(ds_config, Config(fp16=True).deepspeed_values()) == (ds_config, [])


def test_what_a_run_uses_is_what_its_ranks_make_of_the_file(tmp_path):
    """As `choose_checkpoint` of the ranks, which have torch."""
    values = Config(bf16=True).deepspeed_values()
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"fp16": {"min_loss_scale": 0.5}, "zero_optimization": {"stage": 3}}))
    for name in (str(path), "ds_zero3_offload"):
        for on_cpu in (True, False):
            corrected, notes = zero.correct(zero.load(name), values)
            corrected, note = zero.saving_whole_weights(corrected)
            expected = zero.for_machine(corrected, on_cpu=on_cpu)
            notes = [f"deepspeed = {name}: {text}" for text in [*notes, note] if text]
            assert zero.used(name, values, on_cpu=on_cpu) == (expected, notes)
            assert len(notes) == (2 if name == str(path) else 0)


@pytest.mark.parametrize(
    ("ds_config", "problem"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps = 2, but the run has 1"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu = 4, but the run has 1"),
        ({"gradient_clipping": 0.5}, "gradient_clipping = 0.5, but the run has 1.0"),
        ({"bf16": {}}, "bf16.enabled = false, but the run has true"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, "optimizer.params.lr = 0.1, but the run has 1e-05"),
    ],
)
def test_a_setting_that_differs_from_the_run_is_refused(ds_config, problem):
    values = Config(bf16=True).deepspeed_values()
    assert zero.problems(ds_config, values) == [f'{problem}: set it to "auto", or change the run']
    assert zero.check(ds_config, values, source="mine.json") == [
        f'mine.json: {problem}: set it to "auto", or change the run'
    ]


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
