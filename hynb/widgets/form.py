"""A form with every parameter, built from the schema alone; an invalid value is marked while it is typed."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as widgets

from hynb.config import (
    GROUPS,
    MODEL_SIZE_NAMES,
    SCHEDULERS_WITH_MIN_LR,
    Config,
    Parameter,
    check_config,
    parameters,
    value_text,
)
from hynb.errors import ConfigError
from hynb.plan import zero
from hynb.widgets.kernel import acknowledge_edit
from hynb.widgets.markup import STYLE, element, note
from hynb.widgets.table import Table

_CUSTOM_FILE = "a custom JSON file"
# The condition under which a parameter has an effect; its input is disabled until then.
_EFFECTIVE: Mapping[str, Callable[[Config], bool]] = {
    **dict.fromkeys(
        ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules"), lambda config: config.use_lora
    ),
    "train_attention_params_only": lambda config: not config.use_lora,
    "make_moe_param_leaf_module": lambda config: _stage(config) in (3, None),
    "min_lr": lambda config: config.lr_scheduler_type in SCHEDULERS_WITH_MIN_LR,
    "num_train_epochs": lambda config: config.max_steps is None,
    "save_steps": lambda config: config.save_strategy == "steps",
    "bf16": lambda config: not config.fp16,
    "fp16": lambda config: not config.bf16,
    **dict.fromkeys(
        MODEL_SIZE_NAMES, lambda config: config.model_name_or_path is None and config.resume_from_checkpoint is None
    ),
}


class ConfigForm(widgets.VBox):
    """One tab per group of parameters and one row per parameter; `value` is the Config that the form shows.

    Args:
        config: the initial values; `value` of an unedited form equals it.
        costs: called with a Config; returns what each ZeRO preset needs, or why that cannot be estimated.
    """

    def __init__(self, config: Config, *, costs: Callable[[Config], Table | str] | None = None) -> None:
        self._config = config
        self._fields = {item.name: _Field(item, getattr(config, item.name)) for item in parameters()}
        self._costs = costs
        self._cost_table = widgets.HTML()
        self._groups = {
            group: [field for field in self._fields.values() if field.parameter.group == group] for group in GROUPS
        }
        pages = [self._page(group, fields) for group, fields in self._groups.items()]
        self.tabs = widgets.Tab(children=pages, titles=list(GROUPS.values()))
        self.tabs.layout.width = "calc(100% - 4px)"
        self.tabs.add_class("hynb-form")
        self._summary = widgets.HTML()
        for field in self._fields.values():
            field.observe(self._edited)
        super().__init__([widgets.HTML(STYLE), self.tabs, self._summary])
        self._refresh()

    @property
    def value(self) -> Config:
        """The Config that the form shows.

        Raises:
            ConfigError: every invalid value and contradiction, at once.
        """
        if problems := self.problems:
            raise ConfigError(problems)
        return self._read()[0]

    @property
    def problems(self) -> list[str]:
        """What is wrong with the current values, one message each; empty when nothing is."""
        config, problems = self._read()
        return [problem for found in problems.values() for problem in found] + _contradictions(config, self._fields)

    def field(self, name: str) -> widgets.ValueWidget:
        """The input widget of one parameter."""
        return self._fields[name].input

    def row_note(self, name: str) -> widgets.HTML:
        """The text beside the input of one parameter: its help, or what is wrong with the value."""
        return self._fields[name].note

    def custom_file(self) -> widgets.Text:
        """The input for the path of a custom DeepSpeed file."""
        field = self._fields["deepspeed"].custom_file
        assert field is not None
        return field

    def _page(self, group: str, fields: Sequence[_Field]) -> widgets.Widget:
        rows = [child for field in fields for child in (field.label, field.box, field.note)]
        grid = widgets.GridBox(rows)
        grid.layout.grid_template_columns = "235px 260px minmax(200px, 1fr)"
        grid.layout.grid_gap = "2px 14px"
        grid.layout.align_items = "center"
        return widgets.VBox([grid, self._cost_table]) if group == "zero" else grid

    def _read(self) -> tuple[Config, dict[str, list[str]]]:
        """The Config with every value that can be parsed, and the problems of each parameter."""
        changes: dict[str, Any] = {}
        problems: dict[str, list[str]] = {}
        for name, field in self._fields.items():
            try:
                value = field.value
            except ValueError as error:
                problems[name] = [f"{name} {error}"]
                continue
            if found := field.parameter.problems(value):
                problems[name] = found
            if field.changed:
                changes[name] = value
        return (self._config.replace(**changes) if changes else self._config), problems

    def _edited(self, _: Any) -> None:
        self._refresh()
        acknowledge_edit()

    def _refresh(self) -> None:
        config, problems = self._read()
        for name, field in self._fields.items():
            is_effective = _EFFECTIVE[name](config) if name in _EFFECTIVE else True
            field.show(problems.get(name, []), is_effective=is_effective)
        for index, fields in enumerate(self._groups.values()):
            count = sum(field.parameter.name in problems for field in fields)
            title = GROUPS[fields[0].parameter.group]
            if (title := f"{title} ({count} ✗)" if count else title) != self.tabs.get_title(index):
                self.tabs.set_title(index, title)
        in_values = [problem for found in problems.values() for problem in found]
        self._summary.value = _summary(in_values + _contradictions(config, self._fields))
        if self._costs is not None:
            costs = self._costs(config) if not problems else "Shown again once the values above are valid."
            text = costs.html() if isinstance(costs, Table) else element("p", costs, "faint")
            self._cost_table.value = f'<div class="hynb">{text}</div>'


class _Field:
    """The label, input and note of one parameter."""

    def __init__(self, parameter: Parameter, value: Any) -> None:
        self.parameter = parameter
        self._initial = value
        title = html.escape(parameter.help)
        self.label = widgets.HTML(f'<span class="hynb" title="{title}">{element("code", parameter.name)}</span>')
        self.custom_file: widgets.Text | None = None
        tooltip = f"{parameter.name}: {parameter.help}"
        if parameter.name == "deepspeed":
            is_preset = value in zero.PRESETS
            options = [*zero.PRESETS, _CUSTOM_FILE]
            self.input = widgets.Dropdown(
                options=options, value=value if is_preset else _CUSTOM_FILE, tooltip=tooltip
            )
            self.custom_file = widgets.Text(placeholder="path of a DeepSpeed JSON file", layout={"width": "250px"})
            self.custom_file.value = "" if is_preset else value
        elif parameter.choices and value in parameter.choices:
            self.input = widgets.Dropdown(options=parameter.choices, value=value, tooltip=tooltip)
        elif parameter.type is bool and isinstance(value, bool):
            self.input = widgets.Checkbox(value=value, indent=False, description=" ", tooltip=tooltip)
        else:
            self.input = widgets.Text(value=value_text(value), tooltip=tooltip)
        self.input.layout.width = "250px"
        self._initial_input = self._entered
        self._inputs = [self.input] if self.custom_file is None else [self.input, self.custom_file]
        self.box = self.input if self.custom_file is None else widgets.VBox(self._inputs)
        bounds = " ".join(part for part in (parameter.range, parameter.unit) if part)
        facts = "; ".join(part for part in (bounds, f"default {parameter.default_text}") if part)
        help_text = f"{html.escape(parameter.help)} {element('i', f'({facts})')}"
        self._help = f'<div class="hynb faint">{help_text}</div>'
        self.note = widgets.HTML()

    @property
    def value(self) -> Any:
        """The parameter's value in its own type; raises ValueError with the reason if there is none."""
        if not self.changed:
            return self._initial
        entered = self._entered
        return entered if isinstance(entered, bool) else self.parameter.parse(entered.strip())

    @property
    def changed(self) -> bool:
        """Whether the input differs from its initial content."""
        return self._entered != self._initial_input

    @property
    def _entered(self) -> Any:
        if self.custom_file is not None and self.input.value == _CUSTOM_FILE:
            return self.custom_file.value
        return self.input.value

    def observe(self, callback: Callable[[Any], None]) -> None:
        """Calls back on every edit."""
        for item in self._inputs:
            item.observe(callback, names="value")

    def show(self, problems: Sequence[str], *, is_effective: bool) -> None:
        """Shows the problems or the help; an input without effect is disabled unless it was changed."""
        self.note.value = note(f"✗ {'; '.join(problems)}", "bad") if problems else self._help
        self.input.disabled = not is_effective and self._entered in (self._initial_input, False)
        if self.custom_file is not None:
            self.custom_file.layout.display = None if self.input.value == _CUSTOM_FILE else "none"


def _stage(config: Config) -> int | None:
    """The ZeRO stage of a preset; None for a custom file, which is read when the run is checked."""
    preset = zero.PRESETS.get(config.deepspeed)
    return preset.stage if preset else None


def _contradictions(config: Config, fields: Mapping[str, _Field]) -> list[str]:
    """What is wrong between values that are valid by themselves."""
    in_values = {
        problem for name, field in fields.items() for problem in field.parameter.problems(getattr(config, name))
    }
    problems = [problem for problem in check_config(config) if problem not in in_values]
    if config.make_moe_param_leaf_module and _stage(config) not in (3, None):
        problems.append(
            f"make_moe_param_leaf_module needs ZeRO-3, and {config.deepspeed} is stage {_stage(config)}: "
            "choose a ds_zero3 preset, or switch it off"
        )
    if not config.deepspeed.strip():
        problems.append("deepspeed is empty: enter the path of a DeepSpeed JSON file, or choose a preset")
    return problems


def _summary(problems: Sequence[str]) -> str:
    if not problems:
        return note("✓ All values are valid; the next cell uses them.", "good")
    items = "".join(element("li", problem) for problem in problems)
    return f'<div class="hynb bad">To be fixed before training can start:<ul>{items}</ul></div>'
