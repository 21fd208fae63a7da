"""The data sets of a run: checked on rank 0, then built from its plan."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from tiny import tiny_data

from hynb.config import Config
from hynb.demo.pretrain import write_tokenizer
from hynb.errors import DataError
from hynb.runs import RunDir
from hynb.train import build_datasets, check_datasets, training_sampler


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=700, samples=500)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def sample(question: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "a"}]}


def test_a_runs_rejected_lines_are_those_of_its_last_check(tokenizer, tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", sample("q"), {"messages": 3})
    config = Config(train_data_file=str(path), output_dir=str(tmp_path / "run"), on_bad_sample="skip")
    rejected = RunDir(config.output_dir).rejected
    with caplog.at_level(logging.INFO, logger="hynb"):
        assert check_datasets(config, tokenizer).summary["data_rejected"] == 1
    assert f"1 lines or samples are left out; they are kept in {rejected}" in caplog.messages
    assert len(rejected.read_text().splitlines()) == 1
    # The data is fixed before the run is resumed.
    write(path, sample("q"), sample("r"))
    assert check_datasets(config, tokenizer).summary["data_rejected"] == 0
    assert not rejected.exists()


def test_splits_share_no_sample_and_packs_hold_all_of_them(tokenizer, tmp_path):
    path = tiny_data(tmp_path / "a.jsonl", 40)
    config = Config(train_data_file=str(path), output_dir=str(tmp_path / "run"), max_seq_length=256, eval_split=0.25)
    plan = check_datasets(config, tokenizer)
    datasets = build_datasets(config, tokenizer, plan)
    assert datasets.evaluation is not None and datasets.lengths is None
    ids = [[tuple(item["input_ids"]) for item in part] for part in (datasets.train, datasets.evaluation)]
    assert len(ids[0]) == 30 and len(ids[1]) == 10 and not set(ids[0]) & set(ids[1])
    packed = build_datasets(config.replace(packing=True), tokenizer, plan)
    tokens = sum(len(pack["input_ids"]) for pack in packed.train)
    assert len(packed.train) < 30 and tokens == sum(map(len, ids[0]))
    order = list(training_sampler(config, packed, world_size=2))
    assert sorted(order) == list(range(len(packed.train)))
    grouped = build_datasets(config.replace(group_by_length=True), tokenizer, plan)
    assert grouped.lengths is not None and grouped.lengths.tolist() == list(map(len, ids[0]))


def test_another_file_than_the_checked_one_is_refused(tokenizer, tmp_path):
    path = tiny_data(tmp_path / "a.jsonl", 8)
    config = Config(train_data_file=str(path), output_dir=str(tmp_path / "run"), max_seq_length=256)
    plan = check_datasets(config, tokenizer)
    tiny_data(path, 7)
    with pytest.raises(DataError, match="has 7 samples on this host and 8 on rank 0's"):
        build_datasets(config, tokenizer, plan)


def test_too_few_samples_for_a_split_are_reported_by_the_check(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", sample("q"))
    config = Config(train_data_file=str(path), output_dir=str(tmp_path / "run"), eval_split=0.5)
    with pytest.raises(DataError, match="eval_split"):
        check_datasets(config, tokenizer)
