"""Names from files, logs and status are shown as text in every widget, never as elements of the page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from adapters import make_adapter
from shown_html import EVIL, assert_escaped, html_of, make_config, text_of
from tiny import tiny_data, tiny_model

from hynb.config import absolute_paths, to_yaml
from hynb.errors import ClusterError, DataError
from hynb.files import read_json, write_json
from hynb.launch import Run
from hynb.runs import RunWriter
from hynb.widgets import (
    ConfigForm,
    MergeForm,
    RunChooser,
    RunPanel,
    ask_all,
    check,
    check_data,
    check_hosts,
    cluster_view,
    data_view,
    deepspeed_plan,
    machine_table,
    memory_plan,
    merge,
    merge_view,
    preset_costs,
    sample,
)
from hynb.widgets.merge_form import MergeChoice
from hynb.widgets.tasks import Piece


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / EVIL)


@pytest.fixture
def displayed(monkeypatch):
    """What the views display before they return, or before they raise."""
    shown = []

    def show(item, **_):
        shown.append(item)

    for module in (cluster_view, data_view, merge_view):
        monkeypatch.setattr(module, "display", show)
    return shown


def write_run(folder: Path, **status) -> Run:
    writer = RunWriter(folder)
    writer.dir.config.write_text(to_yaml(make_config()))
    writer.event("log", 1, loss=1.0)
    writer.status("finished", global_step=1, max_steps=2)
    write_json(writer.dir.status, (read_json(writer.dir.status) or {}) | status)
    return Run(folder)


def test_the_name_of_a_run_folder_in_the_panel(tmp_path):
    assert_escaped(html_of(RunPanel(write_run(tmp_path / EVIL))))


def test_reason_and_log_of_a_failed_run_in_the_panel(tmp_path, start_writer):
    run = start_writer(tmp_path / "run", steps=3, fails=2, reason=f"out of {EVIL}")
    (run.dir.log / "x_rank0.log").write_text(f"a line\n{EVIL}\n")
    html = html_of(RunPanel(run))
    assert_escaped(html)
    assert text_of(html).count(EVIL) == 2, "the reason, and the line of the log"


@pytest.mark.parametrize(("state", "fields"), [("running", ["phase"]), (EVIL, ["reason"]), (EVIL, [])])
def test_fields_of_a_forged_status_in_the_panel(tmp_path, state, fields):
    """Whoever can write into a run folder must not be able to run code in the pages of those who watch the run."""
    run = write_run(tmp_path / "run", state=state, **dict.fromkeys(fields, EVIL))
    panel = RunPanel(run)
    assert_escaped(html_of(panel))
    panel.stop_watching()


def test_fields_of_forged_events_in_the_panel(tmp_path):
    run = write_run(tmp_path / "run")
    writer = RunWriter(tmp_path / "run")
    for name in ("loss", "learning_rate", "tokens", "tokens_per_second", "step_seconds", "memory_bytes"):
        writer.event("log", 2, **({"loss": 1.0} | {name: EVIL}))
    writer.event("save", 2, path="checkpoint-2", seconds=EVIL)
    (tmp_path / "run" / "checkpoint-2").mkdir()
    writer.status("finished", global_step=2, max_steps=2)
    assert_escaped(html_of(RunPanel(run)))


def test_a_run_folder_and_its_reason_in_the_list_of_runs(tmp_path):
    write_run(tmp_path / EVIL, state="failed", reason=EVIL)
    chooser = RunChooser(tmp_path)
    chooser.show_button.click()
    assert_escaped(html_of(chooser))


def test_values_of_the_form(tmp_path):
    form = ConfigForm(make_config(model_name_or_path=EVIL), costs=lambda config: f"no estimate: {EVIL}")
    form.field("learning_rate").value = EVIL
    assert_escaped(html_of(form))
    form.field("learning_rate").value = "0.1"
    assert_escaped(html_of(form))
    form.field("resume_from_checkpoint").value = EVIL
    form.field("deepspeed").value = "a custom JSON file"
    form.custom_file().value = EVIL
    assert "<img src=x" not in html_of(form)


def test_the_name_of_a_model_in_the_estimates(model):
    config = make_config(model_name_or_path=str(model))
    for table in (preset_costs(config), memory_plan(config)):
        assert_escaped(table._repr_html_())
    assert_escaped(machine_table(model.parent / EVIL)._repr_html_())


def test_the_name_of_a_run_in_the_merge_form(tmp_path):
    write_run(tmp_path / EVIL)
    form = MergeForm(run_dir=str(tmp_path / EVIL), checkpoint="last", save_dtype="keep", output_path="auto")
    assert_escaped(html_of(form))


def test_the_name_of_a_shard_and_of_folders_in_the_views_of_a_merge(model, tmp_path, displayed):
    base = shutil.copytree(model, tmp_path / "base")
    (base / "model.safetensors").rename(base / f"{EVIL}.safetensors")
    adapter = make_adapter(model, tmp_path / EVIL, target_modules=["q_proj"])
    choice = MergeChoice(
        base_model_path=str(base),
        adapter_model_path=str(adapter),
        output_path=str(tmp_path / f"{EVIL}-merged"),
        save_dtype="keep",
        train_data_file=None,
    )
    bars: list[str] = []
    shown = merge_view.ProgressBar.show

    def show(bar, progress):
        shown(bar, progress)
        bars.append(html_of(bar.box))

    merge_view.ProgressBar.show = show
    try:
        assert_escaped(merge(choice)._repr_html_())
        assert_escaped(bars[-1])
        check(choice)
    finally:
        merge_view.ProgressBar.show = shown


def test_questions_and_answers(model, tmp_path, displayed):
    data = tmp_path / "data.jsonl"
    messages = [{"role": "user", "content": f"What is {EVIL}?"}, {"role": "assistant", "content": EVIL}]
    data.write_text(json.dumps({"messages": messages}) + "\n")
    folders = {"base_model_path": str(model), "adapter_model_path": str(model), "output_path": str(model)}
    choice = MergeChoice(**folders, save_dtype="keep", train_data_file=str(data))
    assert_escaped(ask_all(choice, count=1, max_new_tokens=1)._repr_html_())
    view = displayed[-1]
    assert_escaped(html_of(view))
    for part in ("question", "thought", "answer", "end"):
        view.show(Piece(model=0, question=0, part=part, text=EVIL))
    assert_escaped(html_of(view))
    assert text_of(html_of(view)).count(EVIL) == 3 + 4


def test_names_and_texts_of_data_files(model, tmp_path, displayed):
    data = tiny_data(tmp_path / f"{EVIL}.jsonl", 2)
    messages = [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL}]
    data.write_text(json.dumps({"messages": messages}) + "\n" + data.read_text())
    config = make_config(model_name_or_path=str(model), train_data_file=str(data))
    assert_escaped(check_data(config)._repr_html_())
    page = sample(config)._repr_html_()
    assert "<img" not in page and "&lt;" in page
    assert_escaped(page)
    data.write_text(f"{EVIL}\n")
    with pytest.raises(DataError):
        check_data(config)
    assert all("<img src=x" not in html_of(bar.box if hasattr(bar, "box") else bar) for bar in displayed)


def test_the_plan_of_a_run(model, tmp_path):
    data = tiny_data(tmp_path / "data.jsonl", 2)
    config = make_config(model_name_or_path=str(model), train_data_file=str(data), output_dir=str(tmp_path / EVIL))
    assert_escaped(deepspeed_plan(config)._repr_html_())


def test_paths_in_the_table_of_a_preflight(tmp_path, displayed):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=1\n")
    run_config = tmp_path / "run.yaml"
    config = make_config(model_name_or_path=str(tmp_path / EVIL), output_dir=str(tmp_path / "run"))
    run_config.write_text(to_yaml(absolute_paths(config)))
    with pytest.raises(ClusterError):
        check_hosts(str(hostfile), str(run_config), collective=False)
    (table,) = displayed
    assert_escaped(table._repr_html_())
