"""ZeRO presets and files, checked by the real DeepSpeed."""

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
    assert zero.check(zero.for_machine(zero.build(name), on_cpu=on_cpu), source=name) == []


def test_presets_are_what_the_guide_names():
    assert list(zero.PRESETS) == [
        "ds_zero2_no_offload",
        "ds_zero3_no_offload",
        "ds_zero3_offload",
        "ds_zero3_offload_no_auto",
    ]
    last = zero.build("ds_zero3_offload_no_auto")["zero_optimization"]
    assert not [key for key, value in last.items() if value == "auto"]
    for name, preset in zero.PRESETS.items():
        made = zero.build(name)
        assert made["zero_optimization"]["stage"] == preset.stage
        assert ("offload_param" in made["zero_optimization"]) is preset.offload
        assert isinstance(made["fp16"]["min_loss_scale"], int)


def test_a_name_stands_for_the_guides_file(tmp_path):
    assert zero.load("ds_zero2_no_offload.json") == zero.build("ds_zero2_no_offload")
    own = tmp_path / "mine.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert zero.load(str(own))["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1,}', ":1:9: no valid JSON"),
        ('{\n "a": \n}', ":3:1: no valid JSON"),
        ("[1]", "must be a JSON object"),
    ],
)
def test_a_broken_file_is_named_with_its_place(tmp_path, text, says):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        zero.load(str(path))
    assert str(caught.value).startswith(str(path)) and says in str(caught.value)


def test_a_wrong_name_has_its_nearest():
    with pytest.raises(ConfigError, match=r"did you mean ds_zero3_offload\?"):
        zero.load("ds_zero3_ofload")


WRONG = [
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
    ({"zero_optimization": []}, "must be an object"),
    ({"fp16": {"min_loss_scale": 1e-10}}, "fp16.min_loss_scale = 1e-10"),
    ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu = 0"),
    ({"gradient_clipping": "much"}, "gradient_clipping"),
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled and bf16.enabled are both true"),
    ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param needs stage 3"),
]


def test_each_mistake_is_named():
    for wrong, says in WRONG:
        found = zero.check(wrong, source="mine.json")
        assert any(says in problem for problem in found), (wrong, found)
        assert all(problem.startswith("mine.json: ") for problem in found)


def test_all_mistakes_at_once_and_no_torch_in_the_asking_process():
    code = (
        "import sys; from hynb.plan import zero\n"
        "print(len(zero.check({'a': 1, 'zero_optimization': {'b': 1, 'stage': 9}}, source='x')))\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "False"]
