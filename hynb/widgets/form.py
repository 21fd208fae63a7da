"""A form over every parameter, built from the schema alone, that shows an illegal value while it is typed."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as widgets
from IPython import get_ipython

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
from hynb.widgets.table import STYLE, Table

_OWN_FILE = "a JSON file of my own"
# A parameter that has no effect under another one's value can't be edited until it has.
_NEEDS: Mapping[str, Callable[[Config], bool]] = {
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
    """A tab a group of parameters, a row a parameter; `value` is the Config that the form shows.

    Args:
        config: what the form starts from; untouched, `value` equals it.
        costs: what each ZeRO preset would take under a Config, or why that can't be told.
    """

    def __init__(self, config: Config, *, costs: Callable[[Config], Table | str] | None = None) -> None:
        self._config = config
        self._fields = {item.name: _Field(item, getattr(config, item.name)) for item in parameters()}
        self._summary = widgets.HTML()
        self._costs = costs
        self._cost_table = widgets.HTML()
        self._groups = {
            group: [field for field in self._fields.values() if field.parameter.group == group] for group in GROUPS
        }
        pages = [self._page(group, fields) for group, fields in self._groups.items()]
        self._tabs = widgets.Tab(children=pages, titles=list(GROUPS.values()))
        self._tabs.layout.width = "calc(100% - 4px)"
        self._tabs.add_class("hynb-form")
        for field in self._fields.values():
            field.observe(self._edited)
        super().__init__([widgets.HTML(STYLE), self._tabs, self._summary])
        self._refresh()

    @property
    def value(self) -> Config:
        """The Config as it stands in the form.

        Raises:
            ConfigError: every illegal value and contradiction, at once.
        """
        if problems := self.problems:
            raise ConfigError(problems)
        return self._read()[0]

    @property
    def problems(self) -> list[str]:
        """What is wrong with the form's values now; empty when nothing is."""
        config, problems = self._read()
        return [problem for found in problems.values() for problem in found] + _of_all(config, self._fields)

    def field(self, name: str) -> widgets.Widget:
        """The input widget of one parameter."""
        return self._fields[name].input

    def _page(self, group: str, fields: Sequence[_Field]) -> widgets.Widget:
        rows = [child for field in fields for child in (field.label, field.box, field.note)]
        grid = widgets.GridBox(rows)
        grid.layout.grid_template_columns = "235px 260px minmax(200px, 1fr)"
        grid.layout.grid_gap = "2px 14px"
        grid.layout.align_items = "center"
        return widgets.VBox([grid, self._cost_table]) if group == "zero" else grid

    def _read(self) -> tuple[Config, dict[str, list[str]]]:
        """The Config with every value that can be read, and what is wrong by parameter."""
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
        of_all = _of_all(config, self._fields)
        for name, field in self._fields.items():
            field.show(problems.get(name, []), needed=_NEEDS.get(name, lambda _: True)(config))
        for index, fields in enumerate(self._groups.values()):
            count = sum(field.parameter.name in problems for field in fields)
            title = GROUPS[fields[0].parameter.group]
            if (title := f"{title} ({count} ✗)" if count else title) != self._tabs.get_title(index):
                self._tabs.set_title(index, title)
        self._summary.value = _summary([problem for found in problems.values() for problem in found] + of_all)
        if self._costs is not None:
            costs = self._costs(config) if not problems else "Shown again when the values above are mended."
            text = costs.html() if isinstance(costs, Table) else f'<p class="faint">{html.escape(costs)}</p>'
            self._cost_table.value = f'<div class="hynb">{text}</div>'


class _Field:
    """One parameter's label, input and note."""

    def __init__(self, parameter: Parameter, value: Any) -> None:
        self.parameter = parameter
        self._initial = value
        self._own_file: widgets.Text | None = None
        title = html.escape(parameter.help)
        self.label = widgets.HTML(f'<span class="hynb" title="{title}"><code>{parameter.name}</code></span>')
        tooltip = f"{parameter.name}: {parameter.help}"
        if parameter.name == "deepspeed":
            options = [*zero.PRESETS, _OWN_FILE]
            self._own_file = widgets.Text(placeholder="path of a DeepSpeed JSON file", layout={"width": "250px"})
            preset = value if value in zero.PRESETS else _OWN_FILE
            self._own_file.value = "" if value in zero.PRESETS else value
            self.input = widgets.Dropdown(options=options, value=preset, tooltip=tooltip)
        elif parameter.choices and value in parameter.choices:
            self.input = widgets.Dropdown(options=parameter.choices, value=value, tooltip=tooltip)
        elif parameter.type is bool and isinstance(value, bool):
            self.input = widgets.Checkbox(value=value, indent=False, description=" ", tooltip=tooltip)
        else:
            self.input = widgets.Text(value=value_text(value), tooltip=tooltip)
        self.input.layout.width = "250px"
        self._first_text = self._text
        parts = [self.input] if self._own_file is None else [self.input, self._own_file]
        self.box = self.input if self._own_file is None else widgets.VBox(parts)
        self._parts = parts
        bounds = " ".join(part for part in (parameter.range, parameter.unit) if part)
        legal = "; ".join(part for part in (bounds, f"default {parameter.default_text}") if part)
        self._help = f"{html.escape(parameter.help)} <i>({html.escape(legal)})</i>"
        self.note = widgets.HTML()

    @property
    def value(self) -> Any:
        """The parameter's value in its own type; ValueError says why there is none."""
        if not self.changed:
            return self._initial
        text = self._text
        return text if isinstance(text, bool) else self.parameter.parse(text.strip())

    @property
    def changed(self) -> bool:
        """Whether it differs from what the form started with."""
        return self._text != self._first_text

    @property
    def _text(self) -> Any:
        if self._own_file is not None and self.input.value == _OWN_FILE:
            return self._own_file.value
        return self.input.value

    def observe(self, callback: Callable[[Any], None]) -> None:
        """Calls back on every edit."""
        for part in self._parts:
            part.observe(callback, names="value")

    def show(self, problems: Sequence[str], *, needed: bool) -> None:
        """Shows what is wrong, or the help; an input without effect is closed unless it holds a change."""
        if problems:
            self.note.value = f'<div class="hynb bad">✗ {html.escape("; ".join(problems))}</div>'
        else:
            self.note.value = f'<div class="hynb faint">{self._help}</div>'
        self.input.disabled = not needed and self._text in (self._first_text, False)
        if self._own_file is not None:
            self._own_file.layout.display = None if self.input.value == _OWN_FILE else "none"


def acknowledge_edit() -> None:
    """Tells the page that an edit has been taken, from inside the edit's callback.

    The page holds back further edits of an input until then, and ipykernel 7.4 doesn't say so while a cell
    awaits: all but the first of them would be lost without a sign.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is not None:
        kernel._publish_status("idle", "shell")
        # The kernel itself is still at work; its own idle follows.
        kernel._publish_status("busy", "shell", parent={"header": {}})


def _stage(config: Config) -> int | None:
    """The ZeRO stage of a preset; None for a file, which is read when the run is checked."""
    preset = zero.PRESETS.get(config.deepspeed)
    return preset.stage if preset else None


def _of_all(config: Config, fields: Mapping[str, _Field]) -> list[str]:
    """Contradictions between values that are legal by themselves."""
    alone = {problem for name, field in fields.items() for problem in field.parameter.problems(getattr(config, name))}
    problems = [problem for problem in check_config(config) if problem not in alone]
    if config.make_moe_param_leaf_module and _stage(config) not in (3, None):
        problems.append(
            f"make_moe_param_leaf_module needs ZeRO-3, and {config.deepspeed} is stage {_stage(config)}: "
            "choose a ds_zero3 preset, or leave it off"
        )
    if not config.deepspeed.strip():
        problems.append("deepspeed is empty: name a DeepSpeed JSON file, or choose a preset")
    return problems


def _summary(problems: Sequence[str]) -> str:
    if not problems:
        return '<div class="hynb good">✓ All values are legal; the next cell takes them.</div>'
    items = "".join(f"<li>{html.escape(problem)}</li>" for problem in problems)
    return f'<div class="hynb bad">To be mended before training can start:<ul>{items}</ul></div>'
