"""The notebooks: what stands in them, headless by papermill, and in JupyterLab in a real browser."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from browser import CHROMIUM, Lab, jupyter_lab
from conftest import need

from hynb.config import load_yaml, parameters
from hynb.launch import Run
from hynb.widgets import parameters_cell

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


def cells(path: Path, kind: str) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


# -- what stands in them


def test_there_are_three():
    assert NAMES == ["01_setup_cluster", "02_finetune", "03_merge_lora"]


def test_outputs_are_not_committed():
    command = [sys.executable, "-m", "nbstripout", "--verify", *map(str, NOTEBOOKS)]
    assert subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_is_valid_and_for_any_python3_kernel(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_opens_with_its_card_and_ends_with_a_way_on(path):
    notes = cells(path, "markdown")
    for word in ("You get", "You need", "Time", "Hardware", "Cost", "papermill"):
        assert word in notes[0].source
    assert notes[-1].source.startswith("## Next")
    for note in notes:
        for target in re.findall(r"\]\(([^)]+\.ipynb)\)", note.source):
            assert (FOLDER / target).is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_cells_are_short_delegate_and_are_introduced(path):
    notebook = nbformat.read(path, as_version=4)
    code = cells(path, "code")
    assert code[0].metadata.tags == ["parameters"]
    for cell in code[1:]:
        assert len(cell.source.splitlines()) <= 8
        tree = ast.parse(cell.source, mode="exec")
        assert not any(isinstance(node, (ast.For, ast.While, ast.FunctionDef, ast.If)) for node in ast.walk(tree))
        assert not re.search(r"^\s*[!%]|pip install", cell.source, re.MULTILINE)
    for before, cell in zip(notebook.cells[1:], notebook.cells[2:], strict=False):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown"


def test_the_finetune_notebook_offers_every_parameter_of_the_schema():
    """After a change of the schema: python tools/parameters_cell.py writes the cell anew."""
    assert cells(FOLDER / "02_finetune.ipynb", "code")[0].source == parameters_cell()
    seen = papermill.inspect_notebook(FOLDER / "02_finetune.ipynb")
    assert set(seen) == {item.name for item in parameters()} | {"training_args"}
    assert [name for name, item in seen.items() if not item["help"] and name != "training_args"] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_papermill_reads_every_parameter_with_its_comment(path):
    assigned = [target.id for node in ast.parse(cells(path, "code")[0].source).body for target in node.targets]
    assert list(papermill.inspect_notebook(path)) == assigned
    for value in papermill.inspect_notebook(path).values():
        assert isinstance(ast.literal_eval(value["default"]), (str, int, float, bool))


# -- headless


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    from tiny import tiny_data, tiny_model

    folder = tmp_path_factory.mktemp("base")
    tiny_model(folder / "model")
    tiny_data(folder / "data.jsonl")
    return folder


def arguments(base: Path, **values) -> dict:
    chosen = {"model_name_or_path": str(base / "model"), "train_data_file": str(base / "data.jsonl")}
    chosen |= {"output_dir": "runs/first", "use_lora": True, "lora_rank": 4, "learning_rate": 0.01}
    return chosen | {"max_steps": 4, "save_steps": 2, "max_seq_length": 256, "num_processes": 1} | values


def start_headless(name: str, folder: Path, values: dict, out: str) -> subprocess.Popen:
    command = [str(Path(sys.executable).with_name("papermill")), str(FOLDER / f"{name}.ipynb"), out]
    for key, value in values.items():
        command += ["-p", key, str(value)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def run_headless(name: str, folder: Path, values: dict, out: str = "out.ipynb") -> tuple[int, str]:
    """Exit code and error output of papermill's command."""
    process = start_headless(name, folder, values, out)
    said = process.communicate(timeout=200)[1]
    return process.returncode, said


def outputs(path: Path) -> list[dict]:
    return [output for cell in cells(path, "code") for output in cell.outputs]


def text_of(path: Path) -> str:
    found = [output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs(path)]
    return "\n".join(found)


@pytest.fixture(scope="module")
def headless(base, tmp_path_factory) -> dict[str, tuple[Path, int, str]]:
    """The finetune notebook run with nothing but -p, once well and once with a layer that isn't there.

    Returns:
        the folder, exit code and error output of both, which ran side by side.
    """
    values = {"good": arguments(base), "bad": arguments(base, lora_target_modules="no_such_layer")}
    folders = {name: tmp_path_factory.mktemp(name) for name in values}
    started = {name: start_headless("02_finetune", folders[name], values[name], "out.ipynb") for name in values}
    said = {name: process.communicate(timeout=200)[1] for name, process in started.items()}
    return {name: (folders[name], started[name].returncode, said[name]) for name in values}


@pytest.fixture(scope="module")
def trained(headless) -> Path:
    """The folder in which training went well."""
    folder, code, said = headless["good"]
    assert code == 0, said
    return folder


def test_setting_up_shows_the_machine_checks_it_and_writes_a_hostfile_once(tmp_path):
    slots = min(2, len(os.sched_getaffinity(0)))
    code, said = run_headless("01_setup_cluster", tmp_path, {"hostfile": "my/hostfile", "slots": slots})
    assert code == 0, said
    assert (tmp_path / "my" / "hostfile").read_text() == f"localhost slots={slots}\n"
    shown = text_of(tmp_path / "out.ipynb")
    assert "CPU cores" in shown and "deepspeed" in shown and f"localhost slots={slots}" in shown
    assert f"all-reduce over {slots} rank" in shown and "all checks passed, 1 host," in shown and "✓" in shown
    (tmp_path / "my" / "hostfile").write_text("other slots=8\n")
    code, said = run_headless("01_setup_cluster", tmp_path, {"hostfile": "my/hostfile"})
    assert code != 0 and "overwrite_hostfile" in said
    assert (tmp_path / "my" / "hostfile").read_text() == "other slots=8\n"


def test_setting_up_two_hosts_fails_on_a_red_cell_and_passes_when_it_is_mended(tmp_path):
    from hosts import PORT, two_hosts

    with two_hosts(tmp_path / "hosts", shared=False) as made:
        alpha, beta = made

        def execute(**values) -> tuple[int, str, str]:
            words = [word for key, value in values.items() for word in ("-p", key, str(value))]
            command = [str(Path(sys.executable).with_name("papermill")), str(FOLDER / "01_setup_cluster.ipynb")]
            done = alpha.run([*command, "out.ipynb", "-p", "port", str(PORT), *words], check=False)
            return done.returncode, done.stderr, text_of(alpha.path(alpha.disk / "out.ipynb"))

        code, said, _ = execute(hosts="alpha:1,beta:1")
        assert code != 0 and beta.fingerprint in said and "isn't confirmed" in said
        code, said, shown = execute(hosts="alpha:1,beta:1", accept=beta.fingerprint)
        assert code != 0 and "beta: accepts none of our keys. Run there" in said and "✗ not yet" in shown
        for line in re.findall(r"^  ((?:mkdir|grep|chmod) .*)$", said, re.MULTILINE)[:3]:
            beta.run(["sh", "-c", line])
        code, said, shown = execute(hosts="alpha:1,beta:512")
        assert code != 0 and "ClusterError: beta: GPUs: 512 slots" in said and "sed -i" in said
        assert "✗ 512 slots" in shown
        code, said, shown = execute(hosts="alpha:1,beta:1")
        assert code == 0, said
        assert "all-reduce over 2 ranks" in shown and "alpha – beta: " in shown and "all checks passed, 2 hosts" in shown


def test_headless_training_ends_with_a_picture_and_a_table(trained):
    assert Run(trained / "runs" / "first").status().state == "finished"
    made = trained / "out.ipynb"
    pictures = [output for output in outputs(made) if "image/png" in output.get("data", {})]
    assert len(pictures) == 1
    assert pictures[0].metadata["image/png"]["alt"].startswith("Training loss by step")
    shown = text_of(made)
    assert "step 4/4  loss" in shown
    assert re.search(rf"^LoRA adapter +{trained}/runs/first/checkpoint-4$", shown, re.MULTILINE)
    assert '"zero_optimization"' in shown and "hynb launch" in shown and "deepspeed --" in shown
    assert "⟦" in shown and "40 lines = 40 samples + 0 rejected" in shown


def test_the_command_that_the_notebook_shows_makes_the_same_config(trained):
    (shown,) = (text for text in text_of(trained / "out.ipynb").split("\n# ") if text.startswith("The same run"))
    words = re.findall(r"--set (\S+)", shown)
    from hynb.cli import read_config

    assert read_config(None, words) == load_yaml(trained / "runs" / "first" / "run.yaml")


def test_running_all_again_shows_the_same_run_and_never_imports_torch(base, trained, tmp_path):
    """A copy with one more cell, which looks at what the kernel has imported by then."""
    notebook = nbformat.read(FOLDER / "02_finetune.ipynb", as_version=4)
    look = "import sys\nprint(sorted({'torch', 'transformers', 'deepspeed', 'matplotlib.pyplot'} & set(sys.modules)))"
    notebook.cells.append(nbformat.v4.new_code_cell(look))
    nbformat.write(notebook, tmp_path / "copy.ipynb")
    values = arguments(base, output_dir=str(trained / "runs" / "first"))
    started = (trained / "runs" / "first" / "launch.json").read_text()
    papermill.execute_notebook(
        tmp_path / "copy.ipynb", tmp_path / "out.ipynb", values, progress_bar=False, cwd=tmp_path
    )
    assert (trained / "runs" / "first" / "launch.json").read_text() == started
    assert "found the run" in text_of(tmp_path / "out.ipynb")
    assert cells(tmp_path / "out.ipynb", "code")[-1].outputs[0].text == "[]\n"


def test_a_failed_training_ends_papermill_with_the_reason(headless):
    folder, code, said = headless["bad"]
    assert code != 0
    assert "no_such_layer" in said and "RunFailedError" in said
    assert Run(folder / "runs" / "first").status().state == "failed"


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_parameter_is_refused_before_anything_happens(tmp_path, name):
    code, said = run_headless(name, tmp_path, {"max_step": 3, "run_dri": "x", "hostfil": "y"})
    assert code != 0
    for word in ("max_step", "run_dri", "hostfil"):
        assert f"unknown parameter {word}" in said
    assert [path.name for path in tmp_path.iterdir()] == ["out.ipynb"]


def test_merging_headless_checks_asks_and_is_not_done_twice(base, trained):
    values = {"run_dir": "runs/first", "save_dtype": "fp32", "question_count": 2, "max_new_tokens": 8}
    code, said = run_headless("03_merge_lora", trained, values, "merged.ipynb")
    assert code == 0, said
    merged = trained / "runs" / "first-merged"
    assert (merged / "model.safetensors").is_file()
    shown = text_of(trained / "merged.ipynb")
    assert "merging: 100%" in shown and "checking: 100%" in shown
    assert "merged and adapter agree on 2 of 2" in shown
    made_at = (merged / "model.safetensors").stat().st_mtime_ns
    code, said = run_headless("03_merge_lora", trained, values | {"question_count": 0}, "again.ipynb")
    assert code == 0, said
    assert (merged / "model.safetensors").stat().st_mtime_ns == made_at


# -- in a browser


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    need(CHROMIUM is not None, "no Chromium is installed")
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(FOLDER, folder / "notebooks")
    with jupyter_lab(folder / "notebooks", tmp_path_factory.mktemp("settings")) as running:
        running.folder = folder / "notebooks"
        yield running
    for path in folder.rglob("launch.json"):
        Run(path.parent).kill()


def with_values(lab: Lab, name: str, values: dict) -> None:
    """Puts parameters into the lab's copy of a notebook, as papermill would."""
    path = lab.folder / name
    papermill.execute_notebook(FOLDER / name, path, values, prepare_only=True, progress_bar=False)


def wait_until(condition, seconds=20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_for_another_picture(page) -> None:
    before = page.get_attribute("img.hynb-plot", "src")
    page.wait_for_function("old => document.querySelector('img.hynb-plot').src != old", arg=before, timeout=20_000)


def test_training_is_started_watched_left_and_stopped_in_a_browser(base, lab):
    with_values(lab, "02_finetune.ipynb", arguments(base, max_steps=100_000, save_steps=100_000))
    page = lab.open("02_finetune.ipynb")
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    lab.run_all(page)
    # The form says at once what is wrong.
    page.wait_for_selector(".widget-tab", timeout=60_000)
    page.click('.lm-TabBar-tab:has-text("Schedule")')
    rate = page.locator(".widget-tab input[type=text]:visible").first
    rate.fill("-1")
    page.wait_for_selector("text=learning_rate = -1.0: must be > 0 and ≤ 10")
    rate.fill("0.02")
    page.wait_for_selector("text=All values are legal")
    # The panel is alive while the last cell waits; what it shows changes by itself.
    page.wait_for_selector("img.hynb-plot", timeout=90_000)
    run = Run(lab.folder / "runs" / "first")
    assert "Training loss by step" in page.get_attribute("img.hynb-plot", "alt")
    wait_for_another_picture(page)
    assert problems == []
    # The page is reloaded: what was saved comes back and goes on.
    page.click('[data-command="docmanager:save"]')
    saved = lab.folder / "02_finetune.ipynb"
    wait_until(lambda: "application/vnd.jupyter.widget-view+json" in saved.read_text())
    page.on("dialog", lambda dialog: dialog.accept())
    lab.load(page, "02_finetune.ipynb", idle=False)
    page.wait_for_selector("img.hynb-plot", timeout=30_000)
    wait_for_another_picture(page)
    # The kernel is restarted, and its widgets are dead: the last cell alone brings the panel back.
    page.click('.lm-MenuBar-item:has-text("Kernel")')
    page.click('[data-command="kernelmenu:restart"] >> nth=0')
    page.click('.jp-Dialog button:has-text("Restart")')
    lab.wait_idle(page)
    assert run.status().state == "running"
    lab.run_cell(page, "RunChooser(")
    page.click('button.jupyter-button:has-text("Show")')
    # Stop works from there, and says what was saved.
    page.click('.jp-CodeCell:has-text("RunChooser(") button.jupyter-button:has-text("Stop")')
    page.wait_for_selector("text=stopped on request after a checkpoint", timeout=30_000)
    status = run.status()
    assert status.state == "stopped"
    assert [path.name for path in run.checkpoints()] == [f"checkpoint-{status.global_step}"]


# Runs on a host of its own: the server and the browser, which answers what the notebook asks.
ANSWERS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from browser import jupyter_lab
folder, password = Path(sys.argv[2]), sys.stdin.read()
with jupyter_lab(folder, folder.parent / "settings") as lab:
    page = lab.open("01_setup_cluster.ipynb")
    lab.run_all(page)
    page.wait_for_selector(".jp-Stdin-prompt:has-text('Keep them')", timeout=60_000)
    page.locator(".jp-Stdin-input").fill("y")
    page.keyboard.press("Enter")
    page.wait_for_selector(".jp-Stdin-input[type=password]", timeout=30_000)
    page.locator(".jp-Stdin-input[type=password]").fill(password)
    page.keyboard.press("Enter")
    page.wait_for_selector(".jp-OutputArea >> text=all-reduce over 2 ranks:", timeout=90_000)
    page.keyboard.press("Control+s")
    page.wait_for_selector('.jp-StatusBar-TextItem:has-text("Saving completed")', timeout=20_000)
"""


def test_a_person_confirms_a_host_key_and_types_a_password_in_a_browser(tmp_path):
    from hosts import PASSWORD, PORT, two_hosts

    need(CHROMIUM is not None, "no Chromium is installed")
    with two_hosts(tmp_path / "hosts", shared=False) as made:
        folder = made.alpha.path(made.alpha.disk) / "notebooks"
        folder.mkdir()
        values = {"hosts": "alpha:1,beta:1", "port": PORT}
        target = folder / "01_setup_cluster.ipynb"
        papermill.execute_notebook(FOLDER / target.name, target, values, prepare_only=True, progress_bar=False)
        words = [sys.executable, "-c", ANSWERS, Path(__file__).parent, made.alpha.disk / "notebooks"]
        made.alpha.run(words, input=PASSWORD, timeout=240)
        saved = target.read_text()
        assert made.beta.fingerprint in saved and "key installed" in saved and "✓ ready" in saved
        assert PASSWORD not in saved
        assert made.beta.path(made.beta.home / ".ssh" / "authorized_keys").read_text().count("ssh-ed25519") == 1
