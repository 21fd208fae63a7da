"""The list of runs in a folder."""

from __future__ import annotations

import os

from shown_html import html_of, make_config, text_of

from hynb.config import to_yaml
from hynb.widgets import RunChooser
from hynb.widgets.runs import find_runs


def test_runs_are_found_newest_first_and_shown_again(tmp_path, start_writer):
    for index, name in enumerate(("old", "new")):
        start_writer(tmp_path / name, steps=3)
        (tmp_path / name / "run.yaml").write_text(to_yaml(make_config()))
        os.utime(tmp_path / name / "run.yaml", (index + 1, index + 1))
    assert [path.name for path in find_runs(tmp_path)] == ["new", "old"]
    chooser = RunChooser(tmp_path)
    assert text_of(html_of(chooser)).count("finished, step 3 of 3") == 2
    chooser.runs.value = str(tmp_path / "old")
    chooser.show_button.click()
    assert "hynb-plot" in html_of(chooser) and "old: finished" in text_of(html_of(chooser))


def test_runs_that_start_later_are_found_by_a_refresh(tmp_path, start_writer):
    chooser = RunChooser(tmp_path / "runs")
    assert chooser.show_button.disabled
    start_writer(tmp_path / "runs" / "late", steps=1)
    (tmp_path / "runs" / "late" / "run.yaml").write_text(to_yaml(make_config()))
    chooser.refresh_button.click()
    assert not chooser.show_button.disabled and chooser.runs.value == str(tmp_path / "runs" / "late")
