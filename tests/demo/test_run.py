"""The demo as a whole: what it starts with, and what makes it fail."""

from __future__ import annotations

import random
import re

import pytest
from transformers import AutoTokenizer

from hynb.config import check_config
from hynb.data import check_data
from hynb.demo import demo_config, write_demo
from hynb.demo.run import MAX_BASE_EXACT_MATCH, evaluate, run_notebook, summary_problems
from hynb.demo.texts import pretraining_conversation, write_jsonl
from hynb.errors import RunFailedError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("demo"), train=1500, held_out=200)


def test_data_and_config_are_valid(files, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(files.base_model_path)
    config = demo_config(files, tmp_path / "run")
    assert check_data(files.train_data_file, tokenizer, config.max_seq_length).samples == 1500
    assert check_config(config) == []


def test_the_base_can_read_but_does_not_know_the_task(files, tmp_path):
    """It mostly answers what it was pretrained on, and not the demo's question."""
    rng = random.Random(11)
    known = [pretraining_conversation(rng) for _ in range(150)]
    short = [sample for sample in known if len(sample["messages"][-1]["content"]) < 15][:50]
    write_jsonl(tmp_path / "known.jsonl", short)
    assert evaluate(files.base_model_path, tmp_path / "known.jsonl").exact_match > 0.5
    assert evaluate(files.base_model_path, files.held_out_file, limit=50).exact_match < MAX_BASE_EXACT_MATCH


GOOD = {"exact_match": {"base": 0.0, "adapter": 0.9, "merged": 0.9}, "merged_equals_adapter": True}


def test_a_summary_that_shows_everything_has_no_problem():
    assert summary_problems(GOOD) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exact_match": {"base": 0.2, "adapter": 0.9, "merged": 0.9}}, "the base answers 20% .* must be below 10%"),
        ({"exact_match": {"base": 0.0, "adapter": 0.7, "merged": 0.7}}, "the adapter answers 70% .* at least 80%"),
        ({"merged_equals_adapter": False}, "the merged model answers differently"),
    ],
)
def test_a_summary_that_does_not_show_everything_is_a_failure(changes, message):
    (problem,) = summary_problems(GOOD | changes)
    assert re.search(message, problem)


def test_a_notebook_that_fails_is_named(tmp_path):
    with pytest.raises(RunFailedError, match=r"01_setup_cluster\.ipynb: cell \d+ failed: ConfigError"):
        run_notebook("01_setup_cluster", tmp_path, {"no_such_parameter": 1})
