"""The check of the data and the samples in a notebook."""

from __future__ import annotations

from pathlib import Path

import pytest
from shown_html import make_config
from tiny import tiny_data, tiny_model

from hynb.errors import DataError, ModelError
from hynb.widgets import check_data, sample


@pytest.fixture
def config(tmp_path):
    model, data = tiny_model(tmp_path / "model"), tiny_data(tmp_path / "data.jsonl", 6)
    held_out = tiny_data(tmp_path / "held_out.jsonl", 4)
    return make_config(model_name_or_path=str(model), train_data_file=str(data), eval_data_file=str(held_out))


def add_invalid_line(config):
    path = Path(config.train_data_file)
    path.write_text(path.read_text() + "broken\n")


def test_the_report_of_all_files_is_shown(config, capsys):
    shown = check_data(config)
    assert "6 lines = 6 samples + 0 rejected" in repr(shown) and "4 lines = 4 samples" in repr(shown)
    assert "length in tokens" in shown._repr_html_()
    assert "checking the data: 100%, eval_data_file" in capsys.readouterr().out


def test_invalid_lines_are_refused_or_left_out(config, tmp_path):
    add_invalid_line(config)
    with pytest.raises(DataError, match=r"data\.jsonl:7:1: invalid JSON"):
        check_data(config)
    assert "6 samples + 1 rejected" in repr(check_data(config.replace(on_bad_sample="skip")))
    (tmp_path / "data.jsonl").write_text("broken\n")
    with pytest.raises(DataError, match="no sample is left"):
        check_data(config.replace(on_bad_sample="skip"))


def test_a_missing_tokenizer_is_named(config, tmp_path):
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        check_data(config.replace(tokenizer_name_or_path=str(tmp_path)))


def test_samples_are_shown_without_what_a_run_leaves_out_and_with_marks_in_text(config):
    add_invalid_line(config)
    page = sample(config.replace(on_bad_sample="skip", max_seq_length=12), count=9)
    assert repr(page).count("data.jsonl:") == 6 and "⟦" in repr(page)
    assert page._repr_html_().count('class="hynb-sample"') == 6
    assert "line-through" in page._repr_html_() and 'title="' in page._repr_html_()
