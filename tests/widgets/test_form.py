"""The form with every parameter, under plain Python: widgets need no kernel."""

from __future__ import annotations

import ipywidgets
import pytest
from shown_html import html_of, make_config, text_of

from hynb.config import GROUPS, parameters
from hynb.errors import ConfigError
from hynb.widgets import ConfigForm


def titles(form: ConfigForm) -> list[str]:
    return [form.tabs.get_title(index) for index in range(len(GROUPS))]


def test_the_value_of_an_unedited_form_is_its_initial_config():
    initial = make_config(
        learning_rate=1.23456789e-5, min_lr=None, lora_target_modules=["q_proj"], training_args={"adam_beta2": 0.9}
    )
    form = ConfigForm(initial)
    assert form.value == initial
    assert form.value.given == initial.given


def test_the_form_has_an_input_for_each_parameter_and_a_tab_for_each_group():
    form = ConfigForm(make_config())
    assert titles(form) == list(GROUPS.values())
    for item in parameters():
        kind = type(form.field(item.name))
        if item.choices or item.name == "deepspeed":
            assert kind is ipywidgets.Dropdown, item.name
        elif item.type is bool:
            assert kind is ipywidgets.Checkbox, item.name
        else:
            assert kind is ipywidgets.Text, item.name
        assert item.help in form.field(item.name).tooltip
        assert item.help in text_of(form.row_note(item.name).value)
    assert text_of(html_of(form)).count("default ") >= len(parameters())


def test_every_parameter_can_be_changed():
    others = {str: "other", int: "2000", float: "0.5", list: "q_proj, v_proj"}
    seen = []
    form = ConfigForm(make_config(), costs=lambda config: seen.append(config) or "")
    for item in parameters():
        field = form.field(item.name)
        if item.name == "deepspeed":
            field.value = "ds_zero3_offload"
        elif item.choices:
            field.value = next(choice for choice in item.choices if choice != field.value)
        elif item.type is bool:
            field.value = not field.value
        else:
            is_number = item.type is int and item.maximum is not None
            field.value = str(min(2000, int(item.maximum))) if is_number else others[item.type]
    # Together these values contradict each other, but each is valid, so that the costs see them all.
    changed, initial = seen[-1], make_config()
    assert [item.name for item in parameters() if getattr(changed, item.name) == getattr(initial, item.name)] == []
    assert changed.lora_target_modules == ["q_proj", "v_proj"]
    assert changed.given == frozenset(item.name for item in parameters())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("learning_rate", "fast", "learning_rate is 'fast'; it takes a number"),
        ("per_device_train_batch_size", "0", "per_device_train_batch_size = 0: must be ≥ 1"),
        ("lora_dropout", "1.5", "lora_dropout = 1.5: must be ≥ 0 and ≤ 0.95"),
        ("max_steps", "", None),
        ("train_data_file", "", "train_data_file is missing"),
    ],
)
def test_an_invalid_value_is_marked_at_once_and_refused(name, text, message):
    form = ConfigForm(make_config(max_steps=5))
    assert "✗" not in form.row_note(name).value
    assert "✓ All values are valid" in html_of(form)
    form.field(name).value = text
    if message is None:
        assert getattr(form.value, name) is None
        return
    assert any(problem.startswith(message) for problem in form.problems)
    assert "To be fixed before training can start:" in html_of(form)
    with pytest.raises(ConfigError) as caught:
        _ = form.value
    assert message in str(caught.value)
    if "missing" not in message:
        assert "✗" in form.row_note(name).value
        group = next(item.group for item in parameters() if item.name == name)
        assert "(1 ✗)" in titles(form)[list(GROUPS).index(group)]


def test_contradictions_are_shown_at_once():
    form = ConfigForm(make_config(use_lora=True, deepspeed="ds_zero3_no_offload", make_moe_param_leaf_module=True))
    assert form.problems == []
    form.field("deepspeed").value = "ds_zero2_no_offload"
    (problem,) = form.problems
    assert "make_moe_param_leaf_module needs ZeRO-3" in problem
    form.field("make_moe_param_leaf_module").value = False
    assert form.field("make_moe_param_leaf_module").disabled
    form.field("min_lr").value = "1"
    (problem,) = form.problems
    assert "min_lr = 1 is above learning_rate" in problem


def test_an_input_without_effect_is_disabled():
    form = ConfigForm(make_config())
    assert form.field("lora_rank").disabled
    form.field("use_lora").value = True
    assert not form.field("lora_rank").disabled
    assert form.field("train_attention_params_only").disabled


def test_a_custom_deepspeed_file_can_be_entered():
    form = ConfigForm(make_config())
    form.field("deepspeed").value = "a custom JSON file"
    assert any("deepspeed is empty" in problem for problem in form.problems)
    form.custom_file().value = "my.json"
    assert form.value.deepspeed == "my.json"
    assert ConfigForm(make_config(deepspeed="my.json")).value.deepspeed == "my.json"


def test_costs_follow_the_form():
    seen = []
    form = ConfigForm(make_config(), costs=lambda shown: seen.append(shown.use_lora) or "so much")
    form.field("use_lora").value = True
    assert seen == [False, True]
    assert "so much" in html_of(form)
    form.field("lora_rank").value = "0"
    assert "so much" not in html_of(form) and "Shown again once the values above are valid." in html_of(form)
