"""Heavy acts in processes of their own, and the questions that they put to models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny import tiny_data, tiny_model

from hynb.config import Config
from hynb.errors import DataError, MergeError, ModelError
from hynb.generate import split_answer
from hynb.generate.answers import base_of, main
from hynb.widgets.worker import work


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def preview(model: Path, data: Path, **values) -> list[dict]:
    config = Config(model_name_or_path=str(model), train_data_file=str(data), **values)
    return work("preview", config=config.values() | {"training_args": {}}, count=2)


def test_a_preview_says_what_is_trained_on(model, tmp_path):
    first, second = preview(model, tiny_data(tmp_path / "data.jsonl"))
    assert first["source"].endswith("data.jsonl:1") and second["source"].endswith("data.jsonl:2")
    assert first["text"].endswith("<|eos|>⟧") and first["text"].count("⟦") == 1
    assert 0 < first["trained_tokens"] < first["tokens"]


def test_a_users_mistake_comes_back_as_the_error_that_it_is(model, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"messages": "none"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:1: "):
        preview(model, tmp_path / "data.jsonl")


def test_an_act_that_breaks_off_says_so_with_its_output():
    with pytest.raises(RuntimeError, match=r"nonsense broke off with exit code 1:[\s\S]*KeyError"):
        work("nonsense")


def test_models_are_asked_the_same_questions_and_report_on_the_way(model, tmp_path, monkeypatch, capsys):
    reports = []
    data = tiny_data(tmp_path / "data.jsonl")
    folders = [str(model), str(model)]
    items = work("ask", reports.append, folders=folders, questions=str(data), count=2, max_new_tokens=4)
    assert [report["folder"] for report in reports] == folders
    assert len(items) == 2
    for item in items:
        assert item["answers"][0] == item["answers"][1]
        assert item["question"] and item["expected"]
    monkeypatch.setattr(sys, "argv", ["ask", "--questions", str(data), "--count=2", "--max_new_tokens=4", str(model)])
    assert main() == 0
    said = capsys.readouterr().out
    assert said.count("-> ") == 2 and f"-> {items[0]['answers'][0]}" in said


def test_a_folder_with_something_else_is_not_merged_over(model, tmp_path):
    folders = {"base_model_path": str(model), "adapter_model_path": str(tmp_path), "output_path": str(tmp_path)}
    with pytest.raises(MergeError, match=r"something else than this merge.* overwrite_output_path"):
        work("merge", **folders, save_dtype="keep", overwrite=False)


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"neither config\.json nor adapter_config\.json"):
        base_of(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/no/such"}')
    with pytest.raises(ModelError, match="an adapter for the base /no/such, which is not there"):
        base_of(tmp_path)


def test_a_conversation_is_asked_up_to_its_last_question():
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user", "assistant")]
    assert split_answer(turns) == (turns[:4], "a")
    assert split_answer(turns[:2]) == (turns[:2], "")
