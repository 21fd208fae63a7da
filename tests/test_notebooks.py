"""The notebooks: their content, and headless with papermill."""

from __future__ import annotations

import ast
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from notebook_files import FOLDER, small_training
from tiny import tiny_data, tiny_model

from hynb.cli import read_config
from hynb.config import load_yaml, parameters
from hynb.data import read_conversations
from hynb.generate import answers, question_of
from hynb.launch import Run
from hynb.widgets import parameters_cell

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
# Minutes more than papermill takes on an idle machine.
HEADLESS_SECONDS = 540


def cells(path: Path, kind: str) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


# -- content


def test_there_are_three_notebooks():
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
def test_a_notebook_begins_with_its_card_and_ends_with_a_link_to_the_next(path):
    notes = cells(path, "markdown")
    for word in ("You get", "You need", "Time", "Hardware", "Cost", "papermill"):
        assert word in notes[0].source
    assert notes[-1].source.startswith("## Next")
    for note in notes:
        for target in re.findall(r"\]\(([^)]+\.ipynb)\)", note.source):
            assert (FOLDER / target).is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_cells_are_short_call_the_library_and_have_an_introduction(path):
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


def test_the_fine_tuning_notebook_has_every_parameter_of_the_schema():
    """After a change of the schema, python tools/parameters_cell.py rewrites the cell."""
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
    folder = tmp_path_factory.mktemp("base")
    tiny_model(folder / "model")
    tiny_data(folder / "data.jsonl")
    return folder


def training(base: Path, **values) -> dict[str, Any]:
    return small_training(base / "model", base / "data.jsonl", **values)


def start_headless(name: str, folder: Path, values: dict, out: str) -> subprocess.Popen:
    command = [str(Path(sys.executable).with_name("papermill")), str(FOLDER / f"{name}.ipynb"), out]
    for key, value in values.items():
        command += ["-p", key, str(value)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def run_headless(name: str, folder: Path, values: dict, out: str = "out.ipynb") -> tuple[int, str]:
    """Exit code and error output of the papermill command."""
    process = start_headless(name, folder, values, out)
    errors = process.communicate(timeout=HEADLESS_SECONDS)[1]
    return process.returncode, errors


def outputs(path: Path) -> list[dict]:
    return [output for cell in cells(path, "code") for output in cell.outputs]


def text_of(path: Path) -> str:
    found = [output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs(path)]
    return "\n".join(found)


@pytest.fixture(scope="module")
def headless(base, tmp_path_factory) -> dict[str, tuple[Path, int, str]]:
    """The fine-tuning notebook run with nothing but -p: once as it should be, once with a layer that does not exist.

    Returns:
        folder, exit code and error output of both, which ran at the same time.
    """
    values = {"good": training(base), "bad": training(base, lora_target_modules="no_such_layer")}
    folders = {name: tmp_path_factory.mktemp(name) for name in values}
    started = {name: start_headless("02_finetune", folders[name], values[name], "out.ipynb") for name in values}
    errors = {name: process.communicate(timeout=HEADLESS_SECONDS)[1] for name, process in started.items()}
    return {name: (folders[name], started[name].returncode, errors[name]) for name in values}


@pytest.fixture(scope="module")
def trained(headless) -> Path:
    """The folder in which training succeeded."""
    folder, code, errors = headless["good"]
    assert code == 0, errors
    return folder


def test_setting_up_shows_and_checks_the_machine_and_keeps_another_hostfile(tmp_path):
    slots = min(2, len(os.sched_getaffinity(0)))
    code, errors = run_headless("01_setup_cluster", tmp_path, {"hostfile": "my/hostfile", "slots": slots})
    assert code == 0, errors
    assert (tmp_path / "my" / "hostfile").read_text() == f"localhost slots={slots}\n"
    shown = text_of(tmp_path / "out.ipynb")
    assert "CPU cores" in shown and "deepspeed" in shown and f"localhost slots={slots}" in shown
    assert f"all-reduce over {slots} rank" in shown and "all checks passed, 1 host," in shown and "✓" in shown
    (tmp_path / "my" / "hostfile").write_text("other slots=8\n")
    code, errors = run_headless("01_setup_cluster", tmp_path, {"hostfile": "my/hostfile"})
    assert code != 0 and "overwrite_hostfile" in errors
    assert (tmp_path / "my" / "hostfile").read_text() == "other slots=8\n"


def test_setting_up_two_hosts_fails_until_every_check_passes(tmp_path):
    from hosts import PORT, two_hosts

    with two_hosts(tmp_path / "hosts", shared=False) as hosts:
        alpha, beta = hosts

        def execute(**values) -> tuple[int, str, str]:
            words = [word for key, value in values.items() for word in ("-p", key, str(value))]
            command = [str(Path(sys.executable).with_name("papermill")), str(FOLDER / "01_setup_cluster.ipynb")]
            command += ["out.ipynb", "-p", "port", str(PORT), *words]
            done = alpha.run(command, check=False, timeout=HEADLESS_SECONDS)
            return done.returncode, done.stderr, text_of(alpha.path(alpha.disk / "out.ipynb"))

        code, errors, _ = execute(hosts="alpha:1,beta:1")
        assert code != 0 and beta.fingerprint in errors and "isn't confirmed" in errors
        code, errors, shown = execute(hosts="alpha:1,beta:1", accept=beta.fingerprint)
        assert code != 0 and "beta: does not accept this machine's key. Run these lines there" in errors
        assert "✗ not ready" in shown and "✓ ready" in shown
        for line in re.findall(r"^  ((?:mkdir|grep|chmod) .*)$", errors, re.MULTILINE)[:3]:
            beta.run(["sh", "-c", line])
        code, errors, shown = execute(hosts="alpha:1,beta:512")
        assert code != 0 and "ClusterError: beta: GPUs: 512 slots" in errors and "sed -i" in errors
        assert "✗ 512 slots" in shown
        code, errors, shown = execute(hosts="alpha:1,beta:1")
        assert code == 0, errors
        assert "all-reduce over 2 ranks" in shown and "alpha – beta: " in shown
        assert "all checks passed, 2 hosts" in shown


def test_headless_training_ends_with_a_picture_and_a_table(trained):
    assert Run(trained / "runs" / "first").status().state == "finished"
    notebook = trained / "out.ipynb"
    pictures = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert len(pictures) == 1
    assert pictures[0].metadata["image/png"]["alt"].startswith("Training loss by step")
    shown = text_of(notebook)
    assert "step 4/4  loss" in shown
    assert re.search(rf"^LoRA adapter +{trained}/runs/first/checkpoint-4$", shown, re.MULTILINE)
    assert '"zero_optimization"' in shown and "hynb launch" in shown and "deepspeed --" in shown
    assert "⟦" in shown and "40 lines = 40 samples + 0 rejected" in shown


def test_the_command_that_the_notebook_shows_gives_the_same_config(trained):
    (shown,) = (text for text in text_of(trained / "out.ipynb").split("\n# ") if text.startswith("The same run"))
    settings = re.findall(r"--set (\S+)", shown)
    assert read_config(None, settings) == load_yaml(trained / "runs" / "first" / "run.yaml")


def test_running_all_cells_again_shows_the_same_run_and_never_imports_torch(base, trained, tmp_path):
    """Tested with a copy whose additional last cell prints what the kernel has imported."""
    notebook = nbformat.read(FOLDER / "02_finetune.ipynb", as_version=4)
    look = "import sys\nprint(sorted({'torch', 'transformers', 'deepspeed', 'matplotlib.pyplot'} & set(sys.modules)))"
    notebook.cells.append(nbformat.v4.new_code_cell(look))
    nbformat.write(notebook, tmp_path / "copy.ipynb")
    values = training(base, output_dir=str(trained / "runs" / "first"))
    launch = (trained / "runs" / "first" / "launch.json").read_text()
    papermill.execute_notebook(
        tmp_path / "copy.ipynb", tmp_path / "out.ipynb", values, progress_bar=False, cwd=tmp_path
    )
    assert (trained / "runs" / "first" / "launch.json").read_text() == launch
    assert "attached to the run" in text_of(tmp_path / "out.ipynb")
    assert cells(tmp_path / "out.ipynb", "code")[-1].outputs[0].text == "[]\n"


def test_a_failed_training_ends_papermill_with_the_reason(headless):
    folder, code, errors = headless["bad"]
    assert code != 0
    assert "no_such_layer" in errors and "RunFailedError" in errors
    assert Run(folder / "runs" / "first").status().state == "failed"


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_parameter_is_refused_before_anything_happens(tmp_path, name):
    code, errors = run_headless(name, tmp_path, {"max_step": 3, "run_dri": "x", "hostfil": "y"})
    assert code != 0
    for unknown in ("max_step", "run_dri", "hostfil"):
        assert f"unknown parameter {unknown}" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["out.ipynb"]


def test_merging_headless_checks_asks_and_is_not_repeated(base, trained):
    values = {"run_dir": "runs/first", "save_dtype": "fp32", "question_count": 2, "max_new_tokens": 8}
    code, errors = run_headless("03_merge_lora", trained, values, "merged.ipynb")
    assert code == 0, errors
    merged = trained / "runs" / "first-merged"
    assert (merged / "model.safetensors").is_file()
    shown = text_of(trained / "merged.ipynb")
    assert "merging: 100%" in shown and "checking: 100%" in shown
    assert "merged and adapter agree on 2 of 2" in shown
    questions = [question_of(item) for item in itertools.islice(read_conversations(base / "data.jsonl"), 2)]
    for number, answer in enumerate(answers(merged, questions, max_new_tokens=8), 1):
        (written,) = re.findall(
            rf"^merged, question {number}: [\s\S]+?\nanswer: ([\s\S]*?) \[no end", shown, re.MULTILINE
        )
        assert written == (answer.text or "(none)")
    assert shown.count("does not serve this model: its architecture, HunYuanForCausalLM") == 2
    written_at = (merged / "model.safetensors").stat().st_mtime_ns
    code, errors = run_headless("03_merge_lora", trained, values | {"question_count": 0}, "again.ipynb")
    assert code == 0, errors
    assert (merged / "model.safetensors").stat().st_mtime_ns == written_at
