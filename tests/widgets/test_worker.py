"""The heavy tasks of the notebooks, each in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from adapters import make_adapter
from shown_html import make_config
from tiny import tiny_data, tiny_model

from hynb.errors import DataError, MergeError
from hynb.widgets.tasks import Piece
from hynb.widgets.worker import work


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def config_values(model: Path, data: Path) -> dict:
    config = make_config(model_name_or_path=str(model), train_data_file=str(data))
    return config.values() | {"training_args": {}}


def test_a_preview_marks_what_is_trained_on(model, tmp_path):
    data = tiny_data(tmp_path / "data.jsonl")
    first, second = work("preview", config=config_values(model, data), count=2)
    assert first["source"].endswith("data.jsonl:1") and second["source"].endswith("data.jsonl:2")
    assert first["text"].endswith("<|eos|>⟧") and first["text"].count("⟦") == 1
    assert 0 < first["trained_tokens"] < first["tokens"]


def test_the_mistake_of_a_user_comes_back_in_its_own_class(model, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"messages": "none"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:1: "):
        work("preview", config=config_values(model, tmp_path / "data.jsonl"), count=2)


def test_a_task_that_fails_otherwise_is_reported_with_its_output():
    with pytest.raises(RuntimeError, match=r"nonsense failed with exit code 1:[\s\S]*KeyError"):
        work("nonsense")


def test_models_are_asked_the_same_questions_and_progress_names_each(model, tmp_path):
    reports = []
    folders = [str(model), str(model)]
    data = tiny_data(tmp_path / "data.jsonl")
    items = work("ask", reports.append, folders=folders, questions=str(data), count=2, max_new_tokens=4)
    assert [(report.done, report.total, report.text) for report in reports] == [
        (0, 2, model.name),
        (1, 2, model.name),
    ]
    assert len(items) == 2
    for item in items:
        assert item["answers"][0] == item["answers"][1]
        assert item["question"] and item["expected"]


def test_answers_are_reported_while_they_are_written(model, tmp_path):
    """With a template whose prompt opens a thought that the model never closes, and with one that does not."""
    thinking = shutil.copytree(model, tmp_path / "thinking")
    template = thinking / "chat_template.jinja"
    opening = "{% if add_generation_prompt %}<think>{% endif %}"
    template.write_text(template.read_text() + opening)
    data = tiny_data(tmp_path / "data.jsonl")
    pieces: list[Piece] = []
    folders = [str(thinking), str(model)]
    items = work("ask", None, pieces.append, folders=folders, questions=str(data), count=2, max_new_tokens=24)
    for number, part in enumerate(("thought", "answer")):
        for index, item in enumerate(items):
            written = [piece for piece in pieces if (piece.model, piece.question) == (number, index)]
            assert (written[0].part, written[0].text) == ("question", item["question"])
            assert written[-1].part == "end" and written[-1].text in ("", "no end token within 24 tokens")
            texts = [piece.text for piece in written if piece.part == part]
            assert len(texts) == len(written) - 2 > 1
            whole = "".join(texts).strip()
            assert item["answers"][number] == (f"thought: {whole}\nanswer: (none)" if part == "thought" else whole)


def test_a_merge_is_done_once_and_other_content_is_kept(model, tmp_path):
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    arguments = {"base_model_path": str(model), "adapter_model_path": str(adapter), "save_dtype": "keep"}
    arguments["output_path"] = str(tmp_path / "merged")
    reports = []
    first = work("merge", reports.append, **arguments, overwrite=False)
    assert not first["found"] and reports[-1].done == reports[-1].total > 0
    assert work("merge", **arguments, overwrite=False) == first | {"found": True}
    assert work("verify", output_path=arguments["output_path"]) > 0
    with pytest.raises(MergeError, match=r"not the result of this merge.* overwrite_output_path"):
        work("merge", **(arguments | {"save_dtype": "bf16"}), overwrite=False)
    assert not work("merge", **(arguments | {"save_dtype": "bf16"}), overwrite=True)["found"]


def test_the_process_never_imports_what_only_the_kernel_needs(model, tmp_path):
    """Of the tasks, those that load a tokenizer and a model as well as those that merge."""
    data = tiny_data(tmp_path / "data.jsonl")
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    merged = {"base_model_path": str(model), "adapter_model_path": str(adapter), "output_path": str(tmp_path / "m")}
    tasks = {
        "preview": {"config": config_values(model, data), "count": 1},
        "check_data": {"config": config_values(model, data)},
        "ask": {"folders": [str(model)], "questions": str(data), "count": 1, "max_new_tokens": 1},
        "merge": merged | {"save_dtype": "keep", "overwrite": False},
        "verify": {"output_path": str(tmp_path / "m")},
    }
    code = (
        "import json, runpy, sys\n"
        "task, arguments = sys.argv[1:]\n"
        "try: runpy.run_module('hynb.widgets.worker', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert 'torch' in loaded\n"
        "unwanted = loaded & {'ipywidgets', 'matplotlib', 'IPython'}\n"
        "assert not unwanted, unwanted\n"
    )
    for task, arguments in tasks.items():
        done = subprocess.run(
            [sys.executable, "-c", code, task, json.dumps(arguments)], capture_output=True, text=True
        )
        assert done.returncode == 0, (task, done.stderr[-2000:])
        assert '"result"' in done.stdout
