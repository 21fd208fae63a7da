"""The notebooks in JupyterLab in a real browser."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from browser import CHROMIUM, Lab, jupyter_lab
from conftest import need
from notebook_files import FOLDER, small_training
from shown_html import EVIL
from tiny import tiny_data, tiny_model
from waiting import wait_until

from hynb.launch import Run
from hynb.runs import RunWriter


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    need(CHROMIUM is not None, "no Chromium is installed")
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(FOLDER, folder / "notebooks")
    with jupyter_lab(folder / "notebooks", tmp_path_factory.mktemp("settings")) as running:
        yield running
    for path in folder.rglob("launch.json"):
        Run(path.parent).kill()


def with_values(folder: Path, name: str, values: dict[str, Any]) -> None:
    """Writes a copy of a notebook with parameters, as papermill injects them."""
    papermill.execute_notebook(FOLDER / name, folder / name, values, prepare_only=True, progress_bar=False)


def wait_for_another_picture(page) -> None:
    before = page.get_attribute("img.hynb-plot", "src")
    page.wait_for_function("old => document.querySelector('img.hynb-plot').src != old", arg=before)


def test_a_training_is_started_watched_left_and_stopped(lab, tmp_path):
    model, data = tiny_model(tmp_path / "model"), tiny_data(tmp_path / "data.jsonl")
    with_values(lab.folder, "02_finetune.ipynb", small_training(model, data, max_steps=100_000, save_steps=100_000))
    page = lab.open("02_finetune.ipynb")
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    lab.run_all(page)
    # The form marks an invalid value at once.
    page.wait_for_selector(".widget-tab")
    page.click('.lm-TabBar-tab:has-text("Schedule")')
    rate = page.locator(".widget-tab input[type=text]:visible").first
    rate.fill("-1")
    page.wait_for_selector("text=learning_rate = -1.0: must be > 0 and ≤ 10")
    rate.fill("0.02")
    page.wait_for_selector("text=All values are valid")
    # The panel changes by itself while the last cell waits.
    page.wait_for_selector("img.hynb-plot")
    run = Run(lab.folder / "runs" / "first")
    assert "Training loss by step" in page.get_attribute("img.hynb-plot", "alt")
    page.wait_for_selector("text=running (training)")
    wait_for_another_picture(page)
    assert problems == []
    # After a reload of the page the saved panel comes back and goes on, if the page asks in time (comes_back).
    lab.interrupt(page)
    saved = lab.folder / "02_finetune.ipynb"
    # JupyterLab saves by itself too: an earlier version may lack the panel.
    shown_at = saved.stat().st_mtime_ns
    page.click('[data-command="docmanager:save"]')
    wait_until(lambda: saved.stat().st_mtime_ns > shown_at and has_panel(saved), "the saved notebook")
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("dialog", lambda dialog: dialog.accept())
    lab.load(page, "02_finetune.ipynb")
    if comes_back(page):
        wait_for_another_picture(page)
    else:
        shown = page.locator('.jp-CodeCell:has-text("watch(run)") .jp-OutputArea').all_inner_texts()
        warnings.warn(f"no panel after a reload: {shown}; the page said {said[-20:]}", stacklevel=2)
    # After a restart of the kernel its widgets are dead, and the last cell alone brings the panel back.
    page.click('.lm-MenuBar-item:has-text("Kernel")')
    page.click('[data-command="kernelmenu:restart"] >> nth=0')
    page.click('.jp-Dialog button:has-text("Restart")')
    lab.wait_idle(page)
    assert run.status().state == "running"
    lab.run_cell(page, "RunChooser(")
    page.click('button.jupyter-button:has-text("Show")')
    # Its Stop button works, and the panel shows what was saved.
    page.click('.jp-CodeCell:has-text("RunChooser(") button.jupyter-button:has-text("Stop")')
    page.wait_for_selector("text=stopped on request after a checkpoint")
    status = run.status()
    assert status.state == "stopped"
    assert [path.name for path in run.checkpoints()] == [f"checkpoint-{status.global_step}"]


def comes_back(page) -> bool:
    """Whether a page shows the panel of its kernel again without a cell being run, as it does where it is quick.

    A page gives a kernel four seconds to say what widgets it has (_loadFromKernel in @jupyter-widgets/base-manager),
    and then asks for each of them, without a limit; hynb has no part in it.
    """
    from playwright.sync_api import TimeoutError as PageTimeoutError

    try:
        page.wait_for_selector("img.hynb-plot", timeout=60_000)
    except PageTimeoutError:
        return False
    return True


def has_panel(saved: Path) -> bool:
    """Whether a notebook is written as a whole, with the panel of the cell that watches the run."""
    try:
        cells = json.loads(saved.read_text())["cells"]
    except ValueError:
        return False
    (outputs,) = (json.dumps(cell["outputs"]) for cell in cells if "watch(run)" in "".join(cell["source"]))
    return "application/vnd.jupyter.widget-view+json" in outputs


WATCH_ANSWERS = """
window.seen = [];
new MutationObserver(() => {
    for (const card of document.querySelectorAll('.hynb-answer')) window.seen.push(card.innerText);
}).observe(document.body, {childList: true, subtree: true, characterData: true});
"""


def test_answers_are_shown_while_they_are_written(lab, tmp_path):
    """The question cell of the notebook on its own, with one model in the place of all three."""
    model, data = tiny_model(tmp_path / "model"), tiny_data(tmp_path / "data.jsonl", 2)
    choice = "from hynb.widgets.merge_form import MergeChoice\nchoice = MergeChoice(\n"
    for name in ("base_model_path", "adapter_model_path", "output_path"):
        choice += f"    {name}={str(model)!r},\n"
    choice += f"    save_dtype='keep',\n    train_data_file={str(data)!r},\n)\n"
    choice += "question_file, question_count, max_new_tokens = 'auto', 1, 200"
    notebook = nbformat.read(FOLDER / "03_merge_lora.ipynb", as_version=4)
    (ask,) = (cell for cell in notebook.cells if cell.cell_type == "code" and "ask_all(" in cell.source)
    notebook.cells = [nbformat.v4.new_code_cell(choice), ask]
    nbformat.write(notebook, lab.folder / "ask.ipynb")
    page = lab.open("ask.ipynb")
    page.evaluate(WATCH_ANSWERS)
    lab.run_all(page)
    page.wait_for_selector("text=merged and adapter agree on 1 of 1")
    lab.wait_idle(page)
    cards = page.locator(".hynb-answer")
    assert cards.count() == 3
    written = cards.last.inner_text()
    assert written.startswith("base, question 1") and "\nanswer\n" in written and "…" not in written
    growing = [text for text in page.evaluate("window.seen") if text.startswith("base,") and text.endswith("…")]
    answers = {text.partition("\nanswer\n")[2].removesuffix("…").strip() for text in growing} - {""}
    whole = written.partition("\nanswer\n")[2]
    assert len(answers) > 1 and all(whole.startswith(text) for text in answers)


def test_names_of_files_are_not_run_as_scripts(lab):
    """A run folder whose name, reason and log are HTML is shown by a widget, which the page does not sanitise."""
    writer = RunWriter(lab.folder / "forged" / EVIL)
    writer.dir.config.write_text("model_name_or_path: x\n")
    writer.dir.log.mkdir()
    (writer.dir.log / "x_rank0.log").write_text(f"{EVIL}\n")
    writer.status("failed", global_step=1, exit_code=1, reason=EVIL)
    code = (
        "from hynb.widgets import RunChooser\n\nchooser = RunChooser('forged')\nchooser.show_button.click()\nchooser"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, lab.folder / "forged.ipynb")
    page = lab.open("forged.ipynb")
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.accept()))
    lab.run_all(page)
    page.wait_for_selector("text=The run failed.")
    lab.wait_idle(page)
    assert page.locator(f"text={EVIL}").count() >= 3
    assert page.locator("img[src=x]").count() == 0
    assert dialogs == []


# Runs on a host of its own: the server, and a browser that answers what the notebook asks.
ANSWERS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from browser import jupyter_lab
folder, password = Path(sys.argv[2]), sys.stdin.read()
with jupyter_lab(folder, folder.parent / "settings") as lab:
    page = lab.open("01_setup_cluster.ipynb")
    lab.run_all(page)
    page.wait_for_selector(".jp-Stdin-prompt:has-text('Store them')")
    page.locator(".jp-Stdin-input").fill("y")
    page.keyboard.press("Enter")
    page.wait_for_selector(".jp-Stdin-input[type=password]")
    page.locator(".jp-Stdin-input[type=password]").fill(password)
    page.keyboard.press("Enter")
    page.wait_for_selector(".jp-OutputArea >> text=all-reduce over 2 ranks:")
    page.keyboard.press("Control+s")
    page.wait_for_selector('.jp-StatusBar-TextItem:has-text("Saving completed")')
"""


def test_a_person_confirms_a_host_key_and_types_a_password(tmp_path):
    from hosts import PASSWORD, PORT, two_hosts

    need(CHROMIUM is not None, "no Chromium is installed")
    with two_hosts(tmp_path / "hosts", shared=False) as hosts:
        folder = hosts.alpha.path(hosts.alpha.disk) / "notebooks"
        folder.mkdir()
        with_values(folder, "01_setup_cluster.ipynb", {"hosts": "alpha:1,beta:1", "port": PORT})
        command = [sys.executable, "-c", ANSWERS, Path(__file__).parent, hosts.alpha.disk / "notebooks"]
        hosts.alpha.run(command, input=PASSWORD, timeout=540)
        saved = (folder / "01_setup_cluster.ipynb").read_text()
        assert hosts.beta.fingerprint in saved and "key installed" in saved and "✓ ready" in saved
        assert PASSWORD not in saved
        authorized_keys = hosts.beta.path(hosts.beta.home / ".ssh" / "authorized_keys")
        assert authorized_keys.read_text().count("ssh-ed25519") == 1
