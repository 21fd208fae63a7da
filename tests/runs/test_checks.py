"""Where a run may start, and what `overwrite_output_dir` removes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize(
    ("output_dir", "message"),
    [
        ("", "is empty; name a folder"),
        ("  ", "is empty; name a folder"),
        ("/", "is not a folder for a run; name a new folder in it"),
        ("~", "is not a folder for a run; name a new folder in it"),
        ("home", "is not a folder for a run; name a new folder in it"),
        ("file", "is a file; name a folder"),
        ("file/run", "file is a file; name a folder"),
        ("broken", "is a file; name a folder"),
        ("new/deeper/run", None),
        ("link", None),
    ],
)
def test_where_a_run_folder_cannot_be(tmp_path, monkeypatch, output_dir, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "home").symlink_to(Path.home())
    (tmp_path / "broken").symlink_to("nothing")
    found = check_output_dir(output_dir, overwrite=True, resuming=False)
    assert (found == []) if message is None else (message in found[0] and found[0].startswith("output_dir = "))


def test_a_folder_that_is_not_writable_is_refused(tmp_path):
    """Asked as a user who is not root, to whom every folder is writable."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    # Imported before the change of user: root's environment may be closed to others.
    ask = (
        "import os, sys; from hynb.runs import check_output_dir; os.getuid() or os.setuid(65534); "
        "print(check_output_dir(sys.argv[1], overwrite=False, resuming=False))"
    )
    for parent in [tmp_path, *tmp_path.parents][:4]:
        parent.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", ask, folder / "run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"cannot be created or written: {folder} is not writable for this user" in done.stdout


@pytest.mark.parametrize("name", ["events.jsonl", "checkpoint-3", "tensorboard", "ds_config.json", "random_base"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_files_of_somebody_else_are_kept_even_on_overwrite(tmp_path, name, overwrite):
    item = tmp_path / name
    item.write_text("theirs") if item.suffix else item.mkdir()
    for mine in ("run.yaml", "notes.txt"):
        (tmp_path / mine).write_text("")
    (tmp_path / "log").mkdir()
    (found,) = check_output_dir(tmp_path, overwrite=overwrite, resuming=False)
    assert f"holds no run, but {name}, which a run would replace: choose another folder" in found
    config = Config(output_dir=str(tmp_path), overwrite_output_dir=overwrite)
    with pytest.raises(ConfigError, match="which a run would replace"):
        check_run(config)
    assert item.exists()


def test_parameters_logs_and_other_names_are_in_nobodys_way(tmp_path):
    for name in ("run.yaml", "notes.txt", "checkpoint-best"):
        (tmp_path / name).write_text("")
    (tmp_path / "log").mkdir()
    assert check_output_dir(tmp_path, overwrite=False, resuming=False) == []


def test_a_hosts_own_part_of_an_earlier_run_is_resumed_or_overwritten_only_on_request(tmp_path):
    (tmp_path / "led_from").write_text("alpha\n")
    (tmp_path / "log").mkdir()
    assert check_output_dir(tmp_path, overwrite=False, resuming=False) == [], "a failed start left nothing of value"
    (tmp_path / "checkpoint-3").mkdir()
    (found,) = check_output_dir(tmp_path, overwrite=False, resuming=False)
    assert "holds this host's part of an earlier run. Resume it with" in found
    assert check_output_dir(tmp_path, overwrite=True, resuming=False) == []
    assert check_output_dir(tmp_path, overwrite=False, resuming=True) == []


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


@pytest.mark.parametrize("name", ["two words", "$(touch x)", "it's"])
def test_commands_in_messages_are_quoted(tmp_path, name):
    folder = tmp_path / name
    RunWriter(folder).status("running")
    (found,) = check_output_dir(folder, overwrite=False, resuming=False)
    for verb in ("attach", "stop"):
        (command,) = re.findall(rf"`(hynb {verb} .*?)`", found)
        assert shlex.split(command) == ["hynb", verb, str(folder)]


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


def test_a_missing_compiler_is_named_before_a_run_starts(tmp_path):
    """By the command, in an environment without programs, on a machine that has a GPU as far as it can tell."""
    settings = [
        f"model_name_or_path={tmp_path / 'no'}",
        f"output_dir={tmp_path / 'run'}",
        f"train_data_file={tmp_path / 'no.jsonl'}",
        "deepspeed=ds_zero3_offload",
    ]
    (tmp_path / "run.yaml").write_text("\n".join(item.replace("=", ": ", 1) for item in settings))
    command = [sys.executable, "-m", "hynb.cli", "check", "--config", str(tmp_path / "run.yaml")]

    def problems(*more: str) -> str:
        environment = os.environ | {"PATH": "/nonexistent", "CUDA_VISIBLE_DEVICES": "0"}
        environment.pop("CXX", None)
        done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        return done.stderr

    found = problems()
    for text in (
        "deepspeed = ds_zero3_offload: DeepSpeed compiles cpu_adam",
        "no C++ compiler (c++)",
        "apt-get install g++",
        "a preset that needs none: ds_zero3_no_offload, ds_zero3_param_offload",
    ):
        assert text in found, text
    assert "C++" not in problems("--set", "deepspeed=ds_zero3_param_offload")
    # Which hosts compile, and with what, is checked by preflight and by the ranks.
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    assert "C++" not in problems("--set", f"hostfile={tmp_path / 'hosts'}")


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (5, {}, "does not divide the model's 12 attention heads; possible for this model: 1, 2, 4, 12"),
        (6, {}, "neither divides the model's 4 key and value heads nor is a multiple of them"),
        (2, {"model_type": "other"}, "not known to be right for model_type other; set it to 1"),
        (2, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "set it to 1, or max_seq_length to 64"),
        (2, {"rope_parameters": {"rope_type": "longrope"}}, "longrope RoPE depends on the length of a sequence"),
        (2, {"rope_scaling": {"type": "dynamic", "alpha": 1000.0}}, None),
        (12, {}, None),
        (1, {"model_type": "other"}, None),
    ],
)
def test_whether_gpus_can_share_a_models_sequences(tmp_path, size, changes, message):
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4}
    content = {"model_type": "hunyuan_v1_dense", "max_position_embeddings": 64} | heads | changes
    write_json(tmp_path / "config.json", content)
    config = Config(model_name_or_path=str(tmp_path), output_dir=str(tmp_path / "run"), sequence_parallel_size=size)
    with pytest.raises(ConfigError) as raised:
        check_run(config)
    found = [text for text in raised.value.problems if "sequence_parallel_size" in text]
    assert len(found) == (message is not None)
    if message:
        assert found[0].startswith(f"sequence_parallel_size = {size}: ") and message in found[0]


def test_a_batch_size_that_deepspeed_would_count_otherwise_is_refused(tmp_path):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    write_json(tmp_path / "config.json", {"model_type": "hunyuan_v1_dense"} | heads)
    write_json(tmp_path / "ds.json", {"train_batch_size": 8})
    config = Config(
        model_name_or_path=str(tmp_path), output_dir=str(tmp_path / "run"), deepspeed=str(tmp_path / "ds.json")
    )
    with pytest.raises(ConfigError) as raised:
        check_run(config.replace(sequence_parallel_size=2))
    assert any("would count each sequence 2 times; set train_batch_size" in text for text in raised.value.problems)
    with pytest.raises(ConfigError) as raised:
        check_run(config)
    assert not any("train_batch_size" in text for text in raised.value.problems)
