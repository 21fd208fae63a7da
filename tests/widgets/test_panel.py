"""The live panel of a run, written by a process as rank 0 writes it."""

from __future__ import annotations

import os

import pytest
from shown_html import html_of, text_of
from waiting import wait_until

from hynb.launch import Run
from hynb.runs import RunWriter
from hynb.widgets import RunPanel, watch


def shown(panel: RunPanel) -> str:
    return text_of(html_of(panel))


def test_the_panel_follows_a_run_to_its_end_and_its_thread_ends(tmp_path, start_writer):
    panel = RunPanel(start_writer(tmp_path / "车系", steps=12, seconds=0.1))
    assert panel.watching
    first = shown(panel)
    wait_until(lambda: "step 12 of 12" in shown(panel) and not panel.watching)
    assert first != shown(panel)
    assert "车系: finished" in shown(panel)
    assert "0.3333 (first 4.0000" in shown(panel)
    plot = '<img class="hynb-plot" alt="Training loss by step: 4.0000 at step 1, 0.3333 at step 12'
    assert plot in html_of(panel)
    assert "Saved: checkpoint-12 in 0.25 s in " in shown(panel)
    assert (panel.bar.value, panel.bar.max, panel.bar.bar_style) == (12, 12, "success")
    assert panel.stop_button.disabled


@pytest.mark.parametrize("phase", ["checking data", "meeting", "loading"])
def test_the_phase_is_shown_beside_the_state(tmp_path, phase):
    writer = RunWriter(tmp_path / "run")
    writer.phase(phase)
    panel = RunPanel(Run(tmp_path / "run"))
    assert f"run: starting ({phase})" in shown(panel)
    assert "The loss appears here after the first step." in shown(panel)
    writer.status("running", global_step=3, max_steps=9)
    writer.phase("saving")
    wait_until(lambda: "run: running (saving) · step 3 of 9" in shown(panel))
    panel.stop_watching()


def test_the_stop_button_ends_the_run_after_a_checkpoint(tmp_path, start_writer):
    run = start_writer(tmp_path / "run", steps=100_000, seconds=0.05)
    panel = RunPanel(run)
    wait_until(lambda: "hynb-plot" in html_of(panel))
    assert " left, until about " in shown(panel)
    panel.stop_button.click()
    wait_until(lambda: not panel.watching)
    assert run.status().state == "stopped"
    (kept,) = run.checkpoints()
    assert kept.name in shown(panel)
    assert "stop requested" in shown(panel)


def test_a_stop_that_cannot_be_requested_is_shown(tmp_path, start_writer):
    panel = RunPanel(start_writer(tmp_path / "run", steps=100_000, seconds=0.05))
    # A folder where the request belongs: unlike missing rights, root cannot write there either.
    panel.run.dir.stop_request.mkdir(parents=True)
    panel.stop_button.click()
    assert "Is a directory" in shown(panel)
    panel.stop_watching()


def test_a_failed_run_shows_its_reason_and_the_end_of_its_log(tmp_path, start_writer):
    panel = RunPanel(start_writer(tmp_path / "run", steps=5, fails=3))
    assert "The run failed." in shown(panel)
    assert "the GPU's memory is <not> enough" in shown(panel)
    assert "the last line <of it>" in shown(panel)
    assert panel.bar.bar_style == "danger"


def test_watching_ends_on_request_and_the_run_goes_on(tmp_path, start_writer):
    run = start_writer(tmp_path / "run", steps=100_000, seconds=0.05)
    panel = RunPanel(run)
    panel.stop_watching()
    assert not panel.watching
    before, step = html_of(panel), run.status().global_step
    wait_until(lambda: run.status().global_step > step + 3)
    assert html_of(panel) == before
    assert run.status().state == "running"


def test_a_second_panel_of_a_run_replaces_the_first(tmp_path, start_writer):
    run = start_writer(tmp_path / "run", steps=100_000, seconds=0.05)
    first = watch(run)
    second = watch(run)
    assert not first.watching and second.watching
    second.stop_watching()


def test_steps_that_a_resumed_run_repeats_are_shown_once(tmp_path):
    writer = RunWriter(tmp_path)
    for step in (1, 2, 3, 4):
        writer.event("log", step, loss=5.0)
    writer.event("resume", 2)
    writer.event("log", 3, loss=1.0)
    writer.status("finished", global_step=3, max_steps=3)
    panel = RunPanel(Run(tmp_path))
    assert "loss 1.0000 (first 5.0000" in shown(panel)
    assert "1.0000 at step 3;" in html_of(panel)


def test_many_checkpoints_are_counted(tmp_path):
    writer = RunWriter(tmp_path)
    for step in range(1, 12):
        writer.dir.checkpoint(step).mkdir()
    writer.status("finished", global_step=11, max_steps=11)
    text = shown(RunPanel(Run(tmp_path)))
    assert (
        f"Saved: 3 more, checkpoint-4, checkpoint-5, {', '.join(f'checkpoint-{n}' for n in range(6, 12))} in" in text
    )
    assert os.fspath(tmp_path) in text
