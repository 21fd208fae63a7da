"""Absolute paths of a Config."""

from __future__ import annotations

from hynb.config import Config, absolute_paths


def test_paths_become_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.json").write_text("{}")
    config = Config(
        model_name_or_path="model",
        train_data_file="a.jsonl, b/*.jsonl",
        resume_from_checkpoint="last",
        deepspeed="own.json",
        hostfile="~/hosts",
    )
    absolute = absolute_paths(config)
    assert absolute.model_name_or_path == f"{tmp_path}/model"
    assert absolute.train_data_file == f"{tmp_path}/a.jsonl,{tmp_path}/b/*.jsonl"
    assert absolute.output_dir == f"{tmp_path}/runs/train"
    assert absolute.deepspeed == f"{tmp_path}/own.json"
    assert absolute.hostfile is not None and absolute.hostfile.startswith("/") and "~" not in absolute.hostfile
    assert (absolute.resume_from_checkpoint, absolute.eval_data_file) == ("last", None)
    assert absolute_paths(Config()).deepspeed == "ds_zero2_no_offload"
    assert absolute_paths(config.replace(resume_from_checkpoint="c-5")).resume_from_checkpoint == f"{tmp_path}/c-5"
