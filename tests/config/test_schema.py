"""The schema: every parameter with help, bounds and a valid default."""

from __future__ import annotations

import dataclasses

from hynb.config import Config, parameters


def test_every_parameter_is_documented_and_its_default_is_valid():
    names = [item.name for item in parameters()]
    assert len(names) == len(set(names))
    for item in parameters():
        assert len(item.help) >= 15 and item.help.endswith((".", "}")), item.name
        assert item.problems(item.default) == [], item.name
        assert item.parse(item.default_text) == item.default or item.type is float, item.name
        assert item.range or item.type not in (int, float), "a number without a bound would let NaN pass"
    assert {field.name for field in dataclasses.fields(Config)} == {*names, "training_args", "given"}
