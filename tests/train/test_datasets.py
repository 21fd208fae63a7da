"""The data sets of a run: checked on rank 0, then built from its plan."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import pytest
import torch
from tiny import tiny_data

from hynb.config import Config
from hynb.data import cache_folder
from hynb.demo.pretrain import write_tokenizer
from hynb.errors import DataError
from hynb.runs import RunDir
from hynb.train import build_datasets, check_datasets, data_workers, training_arguments, training_sampler


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
    shown = []
    with caplog.at_level(logging.INFO, logger="hynb"):
        assert check_datasets(config, tokenizer, shown.append).summary["data_rejected"] == 1
    assert shown[0] == "train_data_file: 0 of 0 MB", "the status shows it"
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


@pytest.fixture
def unable(tmp_path_factory):
    """A tokenizer with the same vocabulary that cannot render a conversation, so that nothing can be tokenised."""
    unable = write_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=700, samples=500)
    unable.chat_template = None
    return unable


TURNS = [{"role": ("user", "assistant")[n % 2], "content": f"text {n} " * (n + 1)} for n in range(6)]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"packing": True},
        {"packing": True, "split_long_samples": True, "eval_split": 0.3},
        {"split_turns": True, "eval_split": 0.3},
        {"split_turns": True, "packing": True},
        {"eval_data_file": "e.jsonl"},
        {"eval_split": 0.3, "group_by_length": True},
    ],
)
def test_nothing_that_was_checked_is_tokenised_again(tokenizer, unable, tmp_path, monkeypatch, values):
    long = [sample("x " * count) for count in (90, 3, 40)]
    path = write(tmp_path / "a.jsonl", *long, {"messages": 3}, {"messages": TURNS}, *map(sample, "abcdefgh"))
    write(tmp_path / "e.jsonl", *map(sample, "xyz"), {"messages": TURNS})
    given = values | ({"eval_data_file": str(tmp_path / "e.jsonl")} if "eval_data_file" in values else {})
    limits = {"max_seq_length": 60, "on_bad_sample": "skip", "max_cut_share": 1.0}
    config = Config(train_data_file=str(path), output_dir=str(tmp_path / "run"), **limits, **given)
    plan = pickle.loads(pickle.dumps(check_datasets(config, tokenizer)))
    kept = build_datasets(config, unable, plan)
    # A rank on a host whose cache has nothing, which tokenises itself.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other host"))
    tokenised = build_datasets(config, tokenizer, plan)
    assert len(kept.train) > 1 and list(kept.train) == list(tokenised.train)
    assert (kept.evaluation is None) == (not given.keys() & {"eval_split", "eval_data_file"})
    if kept.evaluation is not None and tokenised.evaluation is not None:
        assert list(kept.evaluation) == list(tokenised.evaluation) and len(kept.evaluation)
    with pytest.raises(DataError, match="no chat template"):
        list(build_datasets(config, unable, plan).train)


def test_the_number_of_data_workers_has_a_reason(tokenizer, tmp_path):
    path = tiny_data(tmp_path / "a.jsonl", 8)
    config = Config(train_data_file=str(path), output_dir=str(tmp_path / "run"), max_seq_length=256)
    datasets = build_datasets(config, tokenizer, check_datasets(config, tokenizer))
    assert data_workers(config.replace(dataloader_num_workers=3), datasets) == (3, "as given")
    workers, reason = data_workers(config, datasets)
    assert reason and (torch.cuda.is_available() or workers == 0)
    for count in (0, 2):
        arguments = training_arguments(config, {"zero_optimization": {"stage": 1}}, evaluates=False, workers=count)
        assert arguments.dataloader_num_workers == count and arguments.dataloader_persistent_workers == bool(count)


def test_a_second_run_finds_the_ids_and_the_log_says_where(tokenizer, tmp_path, caplog, monkeypatch):
    path = tiny_data(tmp_path / "a.jsonl", 40)
    config = Config(train_data_file=str(path), output_dir=str(tmp_path / "run"), max_seq_length=256)
    with caplog.at_level(logging.INFO, logger="hynb"):
        first = check_datasets(config, tokenizer)
        second = check_datasets(config.replace(output_dir=str(tmp_path / "second")), tokenizer)
        assert first.train.tokens == second.train.tokens is not None
        file = cache_folder() / first.train.tokens
        text = f"token ids are kept in {file} ({file.stat().st_size / 1e6:.1f} MB)"
        assert sum(text in message for message in caplog.messages) == 2
        file.unlink()
        monkeypatch.setattr("hynb.data.tokens.RESERVE_BYTES", 1 << 60)
        assert check_datasets(config, tokenizer).train.tokens is None
    assert "samples are tokenised during training" in caplog.messages[-1]
