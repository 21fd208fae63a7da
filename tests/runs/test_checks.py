"""Where a run may start, and what `overwrite_output_dir` removes."""

from __future__ import annotations

import json

import pytest

from hynb.config import Config
from hynb.errors import ConfigError
from hynb.files import write_json
from hynb.runs import RunReader, RunWriter, check_output_dir, check_run, clear_run_folder


@pytest.mark.parametrize(
    ("state", "overwrite", "resuming", "message"),
    [
        ("running", True, True, "hynb stop"),
        ("finished", False, False, "overwrite_output_dir"),
        ("finished", True, False, None),
        ("failed", False, True, None),
        ("stopped", False, False, "resume_from_checkpoint"),
    ],
)
def test_where_a_run_may_start(tmp_path, state, overwrite, resuming, message):
    RunWriter(tmp_path).status(state)
    found = check_output_dir(tmp_path, overwrite=overwrite, resuming=resuming)
    assert (found == []) if message is None else (message in found[0])


def test_an_empty_folder_and_a_file(tmp_path):
    assert check_output_dir(tmp_path, overwrite=False, resuming=False) == []
    (tmp_path / "file").write_text("")
    assert "is a file" in check_output_dir(tmp_path / "file", overwrite=True, resuming=False)[0]


@pytest.mark.parametrize("phase", ["loading", "saving"])
def test_a_live_run_of_another_host_is_refused_and_names_its_phase(tmp_path, phase):
    process = {"host": "elsewhere", "pid": 1, "create_time": 1.0}
    write_json(tmp_path / "status.json", {"state": "running", "phase": phase, "process": process})
    write_json(tmp_path / "heartbeat", {"phase": phase, "global_step": 4})
    (found,) = check_output_dir(tmp_path, overwrite=True, resuming=False)
    assert f"has a live run (running, step 4, {phase})" in found
    config = Config(output_dir=str(tmp_path), overwrite_output_dir=True)
    with pytest.raises(ConfigError, match="hynb stop"):
        check_run(config)


@pytest.mark.parametrize("overwrite", [True, False])
def test_an_ended_run_is_cleared(tmp_path, overwrite):
    writer = RunWriter(tmp_path)
    writer.event("log", 1)
    writer.status("failed", reason="x")
    writer.dir.log.mkdir()
    for path in (writer.dir.heartbeat, writer.dir.failure(0), writer.dir.launcher_log, tmp_path / "notes.txt"):
        path.write_text("{}")
    for folder in (writer.dir.checkpoint(3), writer.dir.saving):
        folder.mkdir()
    clear_run_folder(Config(output_dir=str(tmp_path), overwrite_output_dir=overwrite))
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    kept = {"notes.txt"} if overwrite else {"notes.txt", "events.jsonl", "checkpoint-3", "log", "log/launcher.log"}
    assert left == kept
    assert RunReader(tmp_path).status().state == "absent"


def test_a_model_folder_is_checked_as_a_whole(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    config = Config(
        model_name_or_path=str(model), train_data_file=str(tmp_path / "no.jsonl"), output_dir=str(tmp_path)
    )

    def problems() -> list[str]:
        with pytest.raises(ConfigError) as raised:
            check_run(config)
        return raised.value.problems

    assert any("has no config.json, so it is not a model folder" in text for text in problems())
    (model / "adapter_config.json").write_text("{}")
    assert any("it is a LoRA adapter: merge it first" in text for text in problems())
    (model / "config.json").write_text(json.dumps({"model_type": "x", "quantization_config": {}}))
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "one.safetensors").touch()
    found = "\n".join(problems())
    for text in ("is quantised", "1 of 2 shards are missing: two.safetensors", "has no tokenizer", "no.jsonl: "):
        assert text in found, text
