"""Parameters of a notebook: its own cell, the values that papermill injects, and names that nobody reads."""

from __future__ import annotations

import pytest

from hynb.config import Config, parameters
from hynb.errors import ConfigError
from hynb.widgets import check_names, parameters_cell, read_parameters

KNOWN = [item.name for item in parameters()] + ["training_args"]


def namespace(*cells, **values):
    return {"In": ["", *cells]} | values


def test_the_parameters_cell_read_back_is_the_default_config():
    scope = {}
    exec(parameters_cell(), scope)
    read = read_parameters(namespace(parameters_cell(), **scope))
    assert read == Config()
    assert read.given == frozenset()


def test_every_line_of_the_parameters_cell_fits_and_has_a_comment():
    for line in parameters_cell().splitlines():
        assert len(line) <= 110
        assert "# " in line or line in ("", 'training_args = ""')


def test_comments_are_shortened_at_the_end_of_a_clause_or_of_a_word():
    comments = {line.partition(" = ")[0]: line.partition("  # ")[2] for line in parameters_cell().splitlines()}
    for item in parameters():
        comment = comments[item.name].partition(" (≥")[0].partition(" (>")[0]
        whole = item.help.split(". ")[0].rstrip(".")
        shown = comment.removesuffix("…")
        assert whole.startswith(shown) and shown and shown[-1] not in " ,;:", item.name
        assert whole[len(shown) :][:1] in ("", " ", ",", ";", ":"), f"{item.name}: ends inside a word"


def test_injected_values_are_read_in_any_plain_type():
    cell = "# Parameters\nmax_steps = 7"
    given = {"max_steps": 7, "use_lora": "true", "min_lr": "auto", "learning_rate": "2e-4", "lora_alpha": 32}
    more = {"training_args": "adam_beta2=0.95, dataloader_prefetch_factor=2"}
    read = read_parameters(namespace(parameters_cell(), cell, **given, **more))
    assert (read.max_steps, read.use_lora, read.min_lr, read.learning_rate) == (7, True, None, 2e-4)
    assert read.training_args == {"adam_beta2": 0.95, "dataloader_prefetch_factor": 2}
    assert read.given == {"max_steps", "use_lora", "learning_rate", "lora_alpha"}


def test_an_unknown_injected_name_and_a_wrong_type_are_refused_at_once():
    cell = "# Parameters\nmax_step = 7\nlearning_rate = 'x'"
    with pytest.raises(ConfigError) as caught:
        read_parameters(namespace(parameters_cell(), cell, max_step=7, learning_rate="x"))
    assert "unknown parameter max_step (did you mean max_steps?)" in str(caught.value)
    assert "learning_rate is 'x'" in str(caught.value)


def test_a_training_argument_without_a_value_is_named():
    with pytest.raises(ConfigError, match="must be written as name=value name=value; adam_beta2 has no value"):
        read_parameters(namespace(parameters_cell(), training_args="adam_beta2"))


def test_a_corrected_cell_is_accepted():
    wrong = parameters_cell() + "\nmax_step = 3"
    with pytest.raises(ConfigError):
        check_names(namespace(wrong), KNOWN)
    check_names(namespace(wrong, parameters_cell()), KNOWN)


def test_the_known_names_of_another_notebook_are_those_of_its_own_cell():
    own = "# Parameters: some.\nrun_dir = 'runs/a'\ncount: int = 3"
    check_names(namespace(own, "# Parameters\ncount = 4"))
    with pytest.raises(ConfigError, match=r"run_dri \(did you mean run_dir"):
        check_names(namespace(own, "# Parameters\nrun_dri = 'x'"))


def test_names_in_other_cells_are_ignored():
    check_names(namespace("# Parameters: some.\ncount = 3", "mine = 4", "# Parameters\ncount = 5"))


def test_errors_are_shown_in_a_notebook_without_a_traceback():
    assert ConfigError(["one", "two"])._render_traceback_() == ["ConfigError: one", "ConfigError: two"]
