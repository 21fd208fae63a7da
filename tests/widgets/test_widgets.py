"""Forms, panels and the notebooks' session under plain Python: widgets need no kernel."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import os
import subprocess
import sys
import time

import ipywidgets
import pytest
from PIL import Image
from tiny import tiny_data, tiny_model

from hynb.config import GROUPS, Config, absolute_paths, parameters, to_yaml
from hynb.errors import ConfigError, DataError, ModelError, RunError, RunFailedError
from hynb.launch import Run
from hynb.runs import RunStatus, RunWriter
from hynb.widgets import MergeForm, RunChooser, session
from hynb.widgets.form import ConfigForm
from hynb.widgets.panel import RunPanel
from hynb.widgets.plan import check_data, sample
from hynb.widgets.plot import Curve, draw, image_tag, png
from hynb.widgets.runs import find_runs
from hynb.widgets.table import Table, duration_text, size_text

# A process that writes a run folder as rank 0 does: steps, seconds a step, step of its failure or 0.
WRITER = """
import sys, time
from hynb.runs import RunWriter
folder, steps, seconds, fails = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
writer = RunWriter(folder)
writer.dir.log.mkdir(exist_ok=True)
(writer.dir.log / "x_rank0.log").write_text("a line of the log\\nthe last line <of it>\\n")
writer.status("starting")
writer.event("start", 0)
for step in range(1, steps + 1):
    time.sleep(seconds)
    if step == fails:
        writer.status("failed", global_step=step, exit_code=2, reason="the GPU's memory is <not> enough")
        sys.exit(2)
    numbers = {"loss": 4 / step, "learning_rate": 1e-4, "tokens": 100 * step, "tokens_per_second": 50.0}
    writer.event("log", step, **numbers, step_seconds=seconds, memory_bytes=2_000_000_000, grad_norm=1.0)
    writer.status("running", global_step=step, max_steps=steps)
    stop = writer.dir.stop_request.exists()
    if stop or step == steps:
        writer.dir.checkpoint(step).mkdir()
        writer.event("save", step, path=f"checkpoint-{step}", seconds=0.25)
        state = "stopped" if stop else "finished"
        writer.event("end", step, state=state)
        writer.status(state, global_step=step, max_steps=steps, exit_code=0, reason="asked to stop" if stop else "")
        break
"""


@pytest.fixture
def start_writer():
    started = []

    def start(folder, *, steps, seconds=0.0, fails=0):
        command = [sys.executable, "-c", WRITER, str(folder), str(steps), str(seconds), str(fails)]
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        started.append(process)
        if seconds == 0:
            process.wait()
        else:
            wait_until(lambda: (folder / "status.json").exists())
        return Run(folder)

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def config(**values):
    return Config(**{"model_name_or_path": "/models/base", "train_data_file": "data.jsonl"} | values)


# -- form


def test_an_untouched_form_is_the_config_that_it_began_with():
    begun = config(
        learning_rate=1.23456789e-5, min_lr=None, lora_target_modules=["q_proj"], training_args={"adam_beta2": 0.9}
    )
    form = ConfigForm(begun)
    assert form.value == begun
    assert form.value.given == begun.given


def test_the_form_has_an_input_for_each_parameter_in_a_tab_for_each_group():
    form = ConfigForm(config())
    assert [form._tabs.get_title(index) for index in range(len(GROUPS))] == list(GROUPS.values())
    for item in parameters():
        kind = type(form.field(item.name))
        if item.choices or item.name == "deepspeed":
            assert kind is ipywidgets.Dropdown, item.name
        elif item.type is bool:
            assert kind is ipywidgets.Checkbox, item.name
        else:
            assert kind is ipywidgets.Text, item.name
        assert item.help in form.field(item.name).tooltip


def test_every_parameter_can_be_changed_in_the_form():
    others = {str: "other", int: "3", float: "0.5", list: "q_proj, v_proj"}
    form = ConfigForm(config())
    for item in parameters():
        field = form.field(item.name)
        if item.name == "deepspeed":
            field.value = "ds_zero3_offload"
        elif item.choices:
            field.value = next(choice for choice in item.choices if choice != field.value)
        elif item.type is bool:
            field.value = not field.value
        else:
            field.value = others[item.type]
    changed = form._read()[0]
    assert [item.name for item in parameters() if getattr(changed, item.name) == getattr(config(), item.name)] == []
    assert changed.lora_target_modules == ["q_proj", "v_proj"]
    assert changed.given == frozenset(item.name for item in parameters())


@pytest.mark.parametrize(
    ("name", "text", "saying"),
    [
        ("learning_rate", "fast", "learning_rate is 'fast'; it takes a number"),
        ("per_device_train_batch_size", "0", "per_device_train_batch_size = 0: must be ≥ 1"),
        ("lora_dropout", "1.5", "lora_dropout = 1.5: must be ≥ 0 and ≤ 0.95"),
        ("max_steps", "", None),
        ("train_data_file", "", "train_data_file is missing"),
    ],
)
def test_an_illegal_value_shows_at_once_and_is_refused(name, text, saying):
    form = ConfigForm(config(max_steps=5))
    field = form._fields[name]
    assert "✗" not in field.note.value
    field.input.value = text
    if saying is None:
        assert getattr(form.value, name) is None
        return
    assert any(problem.startswith(saying) for problem in form.problems)
    assert "To be mended" in form._summary.value
    with pytest.raises(ConfigError) as caught:
        _ = form.value
    assert saying in str(caught.value)
    if "missing" not in saying:
        assert "✗" in field.note.value
        group = list(GROUPS).index(field.parameter.group)
        assert "✗" in form._tabs.get_title(group)


def test_contradictions_show_at_once():
    form = ConfigForm(config(use_lora=True, deepspeed="ds_zero3_no_offload", make_moe_param_leaf_module=True))
    assert form.problems == []
    form.field("deepspeed").value = "ds_zero2_no_offload"
    (problem,) = form.problems
    assert "make_moe_param_leaf_module needs ZeRO-3" in problem
    form.field("make_moe_param_leaf_module").value = False
    assert form.field("make_moe_param_leaf_module").disabled
    form.field("min_lr").value = "1"
    (problem,) = form.problems
    assert "min_lr = 1 is above learning_rate" in problem


def test_what_has_no_effect_is_closed_until_it_has():
    form = ConfigForm(config())
    assert form.field("lora_rank").disabled
    form.field("use_lora").value = True
    assert not form.field("lora_rank").disabled
    assert form.field("train_attention_params_only").disabled


def test_a_deepspeed_file_of_ones_own_can_be_named():
    form = ConfigForm(config())
    form.field("deepspeed").value = "a JSON file of my own"
    assert any("deepspeed is empty" in problem for problem in form.problems)
    form._fields["deepspeed"]._own_file.value = "my.json"
    assert form.value.deepspeed == "my.json"
    assert ConfigForm(config(deepspeed="my.json")).value.deepspeed == "my.json"


def test_costs_follow_the_form():
    seen = []
    form = ConfigForm(config(), costs=lambda shown: seen.append(shown.use_lora) or "so much")
    form.field("use_lora").value = True
    assert seen == [False, True]
    assert "so much" in form._cost_table.value
    form.field("lora_rank").value = "0"
    assert "mended" in form._cost_table.value


# -- parameters


def namespace(*cells, **values):
    return {"In": ["", *cells]} | values


def test_the_parameters_cell_read_back_is_the_default_config():
    scope = {}
    exec(session.parameters_cell(), scope)
    read = session.read_parameters(namespace(session.parameters_cell(), **scope))
    assert read == Config()
    assert read.given == frozenset()


def test_injected_values_are_read_whatever_plain_type_they_have():
    cell = "# Parameters\nmax_steps = 7"
    given = {"max_steps": 7, "use_lora": "true", "min_lr": "auto", "learning_rate": "2e-4", "lora_alpha": 32}
    more = {"training_args": "adam_beta2=0.95, dataloader_num_workers=2"}
    read = session.read_parameters(namespace(session.parameters_cell(), cell, **given, **more))
    assert (read.max_steps, read.use_lora, read.min_lr, read.learning_rate) == (7, True, None, 2e-4)
    assert read.training_args == {"adam_beta2": 0.95, "dataloader_num_workers": 2}
    assert read.given == {"max_steps", "use_lora", "learning_rate", "lora_alpha"}


def test_an_unknown_injected_name_and_a_wrong_type_are_refused_at_once():
    cell = "# Parameters\nmax_step = 7\nlearning_rate = 'x'"
    with pytest.raises(ConfigError) as caught:
        session.read_parameters(namespace(session.parameters_cell(), cell, max_step=7, learning_rate="x"))
    assert "unknown parameter max_step (did you mean max_steps?)" in str(caught.value)
    assert "learning_rate is 'x'" in str(caught.value)


def test_a_corrected_cell_is_taken_back():
    wrong = session.parameters_cell() + "\nmax_step = 3"
    with pytest.raises(ConfigError):
        session.check_names(
            namespace(wrong), ["max_steps"] + [item.name for item in parameters()] + ["training_args"]
        )
    known = [item.name for item in parameters()] + ["training_args"]
    session.check_names(namespace(wrong, session.parameters_cell()), known)


def test_names_of_another_notebook_are_those_of_its_own_cell():
    own = "# Parameters: some.\nrun_dir = 'runs/a'\ncount: int = 3"
    session.check_names(namespace(own, "# Parameters\ncount = 4"))
    with pytest.raises(ConfigError, match=r"run_dri \(did you mean run_dir"):
        session.check_names(namespace(own, "# Parameters\nrun_dri = 'x'"))


def test_a_name_in_any_other_cell_is_nobodys_business():
    session.check_names(namespace("# Parameters: some.\ncount = 3", "mine = 4", "# Parameters\ncount = 5"))


# -- curves


def test_smoothed_loss_starts_at_the_first_loss_and_forgets_no_number():
    curve = Curve.of([{"kind": "log", "global_step": step, "loss": 3.0} for step in range(1, 101)])
    assert curve.smoothed() == pytest.approx([3.0] * 100)
    curve.loss[50] = float("nan")
    assert curve.smoothed() == pytest.approx([3.0] * 100)


def test_time_left_is_the_pace_of_the_last_steps():
    events = [
        {"kind": "log", "global_step": step, "loss": 1.0, "step_seconds": 100.0 if step < 30 else 2.0}
        for step in range(1, 61)
    ]
    assert Curve.of(events).seconds_left(100) == pytest.approx(80)
    assert Curve.of(events).seconds_left(None) is None
    assert Curve().seconds_left(100) is None


def test_the_picture_has_all_curves_and_holds_a_long_run(tmp_path):
    events = [
        {"kind": "log", "global_step": step, "loss": 1 / step, "learning_rate": 1e-4, "tokens_per_second": 9.0}
        for step in range(1, 20_001)
    ]
    events.append({"kind": "save", "global_step": 500})
    curve = Curve.of(events)
    figure = draw(curve, 30_000)
    loss, rate, speed = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "learning rate", "tokens/s"]
    raw, smooth, save = loss.lines
    assert raw.get_alpha() < smooth.get_linewidth()
    assert len(raw.get_xdata()) <= 1500
    assert raw.get_xdata()[-1] == 20_000
    assert save.get_xdata()[0] == 500
    assert rate.get_xlabel() == speed.get_xlabel() == "step"
    assert loss.get_xlim() == (0, 30_000)
    content = png(curve, 30_000, transparent=False)
    picture = Image.open(io.BytesIO(content)).convert("RGBA")
    assert picture.width > 1000 and len(content) < 80_000
    assert min(picture.getpixel((3, 3))) > 250
    through = Image.open(io.BytesIO(png(curve, 30_000, transparent=True))).convert("RGBA")
    assert through.getpixel((3, 3))[3] == 0
    assert 'alt="a &quot;b&quot;"' in image_tag(content, 'a "b"')
    assert "matplotlib.pyplot" not in sys.modules


def test_evaluations_stand_in_the_picture_in_words_and_in_lines(tmp_path, start_writer, capsys):
    events = [{"kind": "log", "global_step": step, "loss": 1 / step} for step in range(1, 7)]
    numbers = {"eval_tokens": 1234, "eval_perplexity": 2.0, "eval_seconds": 0.5}
    evaluations = [
        {"kind": "eval", "global_step": step, "eval_loss": loss} | numbers
        for step, loss in ((2, 0.7), (4, 0.5), (6, 0.6))
    ]
    curve = Curve.of([*events, *evaluations])
    line = next(line for line in draw(curve, 6).axes[0].lines if line.get_label() == "evaluation")
    assert line.get_xydata().tolist() == [[2, 0.7], [4, 0.5], [6, 0.6]]
    assert line.get_linestyle() == "--" and line.get_marker() == "D", "not told apart by colour alone"
    status = RunStatus(state="running", max_steps=6)
    assert ("evaluation loss", "0.6000 at step 6 (lowest 0.5000 at step 4)") in curve.facts(status)
    assert "evaluation loss 0.6000 at step 6" in curve.alt_text(status)
    run = start_writer(tmp_path, steps=2)
    RunWriter(tmp_path).event("eval", 2, eval_loss=0.5, **numbers)
    asyncio.run(session.finished(run))
    assert "evaluation at step 2: loss 0.5000 over 1,234 tokens, perplexity 2" in capsys.readouterr().out


def test_checking_the_data_shows_the_report_and_refuses_broken_lines(tmp_path, capsys):
    model, data = tiny_model(tmp_path / "model"), tiny_data(tmp_path / "data.jsonl", 6)
    held_out = tiny_data(tmp_path / "held_out.jsonl", 4)
    given = config(model_name_or_path=str(model), train_data_file=str(data), eval_data_file=str(held_out))
    shown = check_data(given)
    assert "6 lines = 6 samples + 0 rejected" in repr(shown) and "4 lines = 4 samples" in repr(shown)
    assert "length in tokens" in shown._repr_html_()
    assert "checking the data: 100%, eval_data_file" in capsys.readouterr().out
    data.write_text(data.read_text() + "broken\n")
    with pytest.raises(DataError, match=r"data\.jsonl:7:1: invalid JSON"):
        check_data(given)
    assert "6 samples + 1 rejected" in repr(check_data(given.replace(on_bad_sample="skip")))
    # The preview passes over what a run leaves out, and marks by signs what colours mark.
    page = sample(given.replace(on_bad_sample="skip", max_seq_length=12), count=9)
    assert repr(page).count("data.jsonl:") == 6 and "⟦" in repr(page)
    assert page._repr_html_().count('class="hynb-sample"') == 6
    assert "line-through" in page._repr_html_() and 'title="' in page._repr_html_()
    data.write_text("broken\n")
    with pytest.raises(DataError, match="no sample is left"):
        check_data(given.replace(on_bad_sample="skip"))
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        check_data(given.replace(tokenizer_name_or_path=str(tmp_path)))


def test_sizes_and_times_are_read_by_people():
    assert [size_text(value) for value in (0, 999, 1000, 676_000_000, 777e9, 2.5e12)] == [
        *("0 B", "999 B", "1 kB", "676 MB", "777 GB", "2.5 TB"),
    ]
    assert [duration_text(value) for value in (4.4, 95, 7500, 200_000)] == [
        *("4 s", "1 min 35 s", "2 h 5 min", "2.3 days"),
    ]


def test_a_table_is_aligned_as_text_and_escaped_as_html():
    table = Table(columns=("名字", "b"), rows=[("x", "<1>"), ("车系", "2")], title="T", chosen=1)
    lines = repr(table).splitlines()
    assert lines == ["T", "名字  b", "----  ---", "x     <1>", "车系  2  <-"]
    assert "&lt;1&gt;" in table.html() and "<1>" not in table.html()


# -- panel


def test_the_panel_follows_a_run_to_its_end_and_its_thread_ends(tmp_path, start_writer):
    run = start_writer(tmp_path / "车系", steps=12, seconds=0.1)
    panel = RunPanel(run)
    assert panel.watching
    first = panel._header.value
    wait_until(lambda: "step 12 of 12" in panel._header.value and not panel.watching)
    assert first != panel._header.value
    assert "finished" in panel._header.value and "车系" in panel._header.value
    assert "0.3333 (first 4.0000" in panel._header.value
    assert (
        '<img class="hynb-plot" alt="Training loss by step: 4.0000 at step 1, 0.3333 at step 12' in panel._plot.value
    )
    assert "checkpoint-12</code> in 0.25 s" in panel._saved.value
    assert (panel._bar.value, panel._bar.max, panel._bar.bar_style) == (12, 12, "success")
    assert panel.stop_button.disabled


def test_the_stop_button_ends_the_run_after_a_checkpoint(tmp_path, start_writer):
    run = start_writer(tmp_path / "run", steps=1000, seconds=0.05)
    panel = RunPanel(run)
    wait_until(lambda: "hynb-plot" in panel._plot.value)
    assert "left" in panel._header.value and "until about" in panel._header.value
    panel.stop_button.click()
    wait_until(lambda: not panel.watching)
    assert run.status().state == "stopped"
    (kept,) = run.checkpoints()
    assert kept.name in panel._saved.value
    assert "asked to stop" in panel._failure.value


def test_a_failed_run_shows_its_reason_and_the_end_of_its_log(tmp_path, start_writer):
    run = start_writer(tmp_path / "run", steps=5, fails=3)
    panel = RunPanel(run)
    assert "The run failed" in panel._failure.value
    assert "the GPU&#x27;s memory is &lt;not&gt; enough" in panel._failure.value
    assert "the last line &lt;of it&gt;" in panel._failure.value
    assert panel._bar.bar_style == "danger"


def test_watching_ends_on_request_and_the_run_goes_on(tmp_path, start_writer):
    run = start_writer(tmp_path / "run", steps=1000, seconds=0.05)
    panel = RunPanel(run)
    panel.stop_watching()
    assert not panel.watching
    shown = panel._header.value
    time.sleep(0.6)
    assert panel._header.value == shown
    assert run.status().state == "running"


def test_a_second_panel_on_a_run_takes_the_firsts_place(tmp_path, start_writer):
    run = start_writer(tmp_path / "run", steps=1000, seconds=0.05)
    first = session.watch(run)
    second = session.watch(run)
    assert not first.watching and second.watching
    second.stop_watching()


def test_steps_that_a_resumed_run_does_again_are_drawn_once(tmp_path):
    writer = RunWriter(tmp_path)
    for step in (1, 2, 3, 4):
        writer.event("log", step, loss=5.0)
    writer.event("resume", 2)
    writer.event("log", 3, loss=1.0)
    writer.status("finished", global_step=3, max_steps=3)
    panel = RunPanel(Run(tmp_path))
    assert [event["global_step"] for event in panel._events if event["kind"] == "log"] == [1, 2, 3]
    assert "loss</span> 1.0000" in panel._header.value


# -- waiting and results


def test_waiting_prints_plain_lines_and_ends_with_the_run(tmp_path, start_writer, capsys):
    run = start_writer(tmp_path / "run", steps=60, seconds=0.02)
    status = asyncio.run(session.finished(run))
    assert status.state == "finished"
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert 5 <= len(steps) <= 30
    assert steps[-1].startswith("step 60/60  loss 0.0667")
    assert "saved checkpoint-60 in 0.25 s" in lines
    assert lines[-1] == "finished, step 60 of 60"


def test_waiting_for_a_failed_run_raises_what_the_run_said(tmp_path, start_writer, capsys):
    run = start_writer(tmp_path / "run", steps=5, fails=3)
    with pytest.raises(RunFailedError) as caught:
        asyncio.run(session.finished(run))
    assert "the GPU's memory is <not> enough" in str(caught.value)
    assert "the last line <of it>" in str(caught.value)


def test_the_result_names_numbers_and_where_the_adapter_is(tmp_path, start_writer):
    run = start_writer(tmp_path / "run", steps=4)
    (run.output_dir / "checkpoint-4" / "adapter_config.json").write_text("{}")
    table = dict(session.result_table(run, run.status(), Curve.of(run.events())).rows)
    assert table["state"] == "finished, step 4 of 4"
    assert table["loss"].startswith("1.0000 (first 4.0000")
    assert table["lowest loss"] == "1.0000 at step 4"
    assert table["LoRA adapter"] == str(run.output_dir / "checkpoint-4")


# -- starting and finding again


@pytest.fixture
def launches(monkeypatch):
    """What would be launched; a launch itself is tested with real processes elsewhere."""
    launched = []

    def launch(config):
        launched.append(config)
        writer = RunWriter(config.output_dir)
        (writer.dir.config).write_text(to_yaml(config.replace(overwrite_output_dir=False)))
        writer.status("running", global_step=1, max_steps=2)
        return Run(config.output_dir)

    monkeypatch.setattr(session, "launch", launch)
    monkeypatch.setattr(session, "_started", {})
    return launched


def end(folder, state):
    RunWriter(folder).status(state, global_step=2, max_steps=2)


def test_launching_again_attaches_live_or_ended(tmp_path, launches, capsys):
    wanted = config(output_dir=str(tmp_path / "run"))
    session.start_or_attach(wanted)
    session.start_or_attach(wanted)
    end(tmp_path / "run", "finished")
    session.start_or_attach(wanted)
    assert len(launches) == 1
    assert "found the run" in capsys.readouterr().out


def test_a_live_run_with_other_values_is_shown_and_named(tmp_path, launches, capsys):
    session.start_or_attach(config(output_dir=str(tmp_path / "run")))
    session.start_or_attach(config(output_dir=str(tmp_path / "run"), max_steps=9))
    assert len(launches) == 1
    assert "max_steps = None (here 9)" in capsys.readouterr().out


def test_other_values_for_an_ended_run_are_left_to_launch(tmp_path, launches):
    session.start_or_attach(config(output_dir=str(tmp_path / "run")))
    end(tmp_path / "run", "finished")
    session.start_or_attach(config(output_dir=str(tmp_path / "run"), max_steps=9))
    assert len(launches) == 2


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_a_stopped_run_goes_on_when_that_is_asked(tmp_path, launches, state):
    wanted = config(output_dir=str(tmp_path / "run"), resume_from_checkpoint="last")
    session.start_or_attach(wanted)
    end(tmp_path / "run", state)
    session.start_or_attach(wanted)
    assert len(launches) == 2
    end(tmp_path / "run", "finished")
    session.start_or_attach(wanted)
    assert len(launches) == 2


def test_overwriting_starts_anew_but_never_its_own_finished_run(tmp_path, launches, monkeypatch):
    wanted = config(output_dir=str(tmp_path / "run"), overwrite_output_dir=True)
    session.start_or_attach(wanted)
    end(tmp_path / "run", "finished")
    session.start_or_attach(wanted)
    assert len(launches) == 1
    monkeypatch.setattr(session, "_started", {})
    session.start_or_attach(wanted)
    assert len(launches) == 2


def test_runs_are_found_newest_first_and_shown_again(tmp_path, launches, start_writer):
    for index, name in enumerate(("old", "new")):
        start_writer(tmp_path / name, steps=3)
        (tmp_path / name / "run.yaml").write_text(to_yaml(config()))
        os.utime(tmp_path / name / "run.yaml", (index + 1, index + 1))
    assert [path.name for path in find_runs(tmp_path)] == ["new", "old"]
    chooser = RunChooser(tmp_path)
    chooser.runs.value = str(tmp_path / "old")
    chooser.show_button.click()
    (panel,) = chooser._place.children
    assert panel.run.output_dir.name == "old" and "hynb-plot" in panel._plot.value
    empty = RunChooser(tmp_path / "nothing")
    assert empty.show_button.disabled


# -- merge form


@pytest.fixture
def lora_run(tmp_path):
    for name in ("train", "full"):
        folder = tmp_path / name
        for step in (5, 10):
            (folder / f"checkpoint-{step}").mkdir(parents=True)
            if name == "train":
                text = '{"base_model_name_or_path": "/models/base"}'
                (folder / f"checkpoint-{step}" / "adapter_config.json").write_text(text)
        chosen = absolute_paths(config(output_dir=str(folder)))
        (folder / "run.yaml").write_text(to_yaml(chosen))
    return tmp_path / "train"


def merge_form(run_dir, **changes):
    values = {"checkpoint": "last", "save_dtype": "keep", "output_path": "auto"} | changes
    return MergeForm(run_dir=str(run_dir), **values)


def test_the_merge_form_chooses_run_checkpoint_and_dtype(lora_run):
    form = merge_form(lora_run)
    choice = form.value
    assert choice.adapter_model_path == str(lora_run / "checkpoint-10")
    assert choice.base_model_path == "/models/base"
    assert choice.output_path == str(lora_run.with_name("train-merged"))
    assert choice.train_data_file.endswith("data.jsonl")
    form.checkpoint.value, form.save_dtype.value = "checkpoint-5", "bf16"
    assert dataclasses.asdict(form.value) == dataclasses.asdict(choice) | {
        "adapter_model_path": str(lora_run / "checkpoint-5"),
        "save_dtype": "bf16",
    }
    form.run.value = str(lora_run.with_name("full"))
    with pytest.raises(RunError, match="has no LoRA checkpoint"):
        _ = form.value


@pytest.mark.parametrize(
    ("changes", "saying"),
    [
        ({"save_dtype": "int8"}, "save_dtype = 'int8': must be one of keep, bf16, fp16, fp32"),
        ({"checkpoint": "checkpoint-7"}, "checkpoint-5, checkpoint-10"),
    ],
)
def test_the_merge_form_refuses_what_is_not_there(lora_run, changes, saying):
    with pytest.raises((ConfigError, RunError), match=saying):
        merge_form(lora_run, **changes)


def test_the_merge_form_names_the_runs_that_are_there(lora_run):
    with pytest.raises(RunError, match=r"no run in .*nothing; runs beside it: (train, full|full, train)"):
        merge_form(lora_run.with_name("nothing"))


def test_errors_are_shown_in_a_notebook_without_a_traceback():
    assert ConfigError(["one", "two"])._render_traceback_() == ["ConfigError: one", "ConfigError: two"]


def test_a_status_that_is_not_known_has_words_too():
    assert Curve().alt_text(RunStatus(state="starting")) == "No loss yet; the run is starting."
