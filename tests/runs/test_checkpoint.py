"""Checkpoints: which can be resumed, and the base of a Config, a checkpoint, an adapter and a model folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from tiny import tiny_model

from hynb.config import Config
from hynb.errors import ModelError, RunError
from hynb.files import write_json
from hynb.runs import (
    BASE_IDENTITY,
    CHECKPOINT_RECORD,
    RunDir,
    RunWriter,
    base_identity,
    check_checkpoint,
    check_same_shape,
    ended_well,
    find_base,
    is_resharded,
    resume_candidates,
    same_base,
    set_aside,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "hunyuan_v1_dense")


@pytest.fixture
def adapter(model, tmp_path) -> Path:
    folder = tmp_path / "run" / "checkpoint-3"
    folder.mkdir(parents=True)
    write_json(folder / "adapter_config.json", {"base_model_name_or_path": str(model)})
    write_json(folder / BASE_IDENTITY, base_identity(model))
    write_json(folder / "trainer_state.json", {"global_step": 3})
    (folder / "global_step3").mkdir()
    return folder


def test_the_base_of_a_config(model, adapter):
    assert find_base(Config()) is None, "a random model"
    assert find_base(Config(model_name_or_path=str(model))) == model
    resumed = Config(resume_from_checkpoint="last", output_dir=str(adapter.parent))
    assert find_base(resumed) == model
    assert find_base(resumed.replace(resume_from_checkpoint=str(adapter))) == model
    full = resumed.replace(resume_from_checkpoint=str(model))
    assert find_base(full) == model, "a full checkpoint is its own base"


def test_the_base_of_a_folder(model, adapter):
    assert find_base(adapter) == model
    assert find_base(model) == model


def test_a_base_that_was_moved_is_named_by_the_config(model, adapter, tmp_path):
    moved = shutil.copytree(model, tmp_path / "moved")
    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": "/no/such"})
    with pytest.raises(ModelError, match="is an adapter for the base /no/such, which is not there"):
        find_base(adapter)
    config = Config(resume_from_checkpoint=str(adapter))
    with pytest.raises(ModelError, match=r"/no/such, which is not there.*model_name_or_path"):
        find_base(config)
    assert find_base(config.replace(model_name_or_path=str(moved))) == moved


def test_another_base_than_the_adapters_is_refused(model, adapter, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    content = json.loads((other / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    (other / "config.json").write_text(json.dumps(content))
    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": str(other)})
    with pytest.raises(ModelError, match=f"trained on another base than {other}.*Its base was {model}"):
        find_base(adapter)


def test_a_folder_that_is_neither_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"neither config\.json nor adapter_config\.json"):
        find_base(tmp_path)


def test_why_a_folder_cannot_be_resumed(tmp_path):
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()
    assert "its parent folder has checkpoint-5" in check_checkpoint(tmp_path / "checkpoint-6", trusted=True)[0]
    (message,) = check_checkpoint(tmp_path, trusted=True)
    assert f"not a checkpoint; did you mean {checkpoint}?" in message
    write_json(checkpoint / "trainer_state.json", {"global_step": 5})
    assert "no optimizer state" in check_checkpoint(checkpoint, trusted=True)[0]
    (checkpoint / "global_step5").mkdir()
    assert check_checkpoint(checkpoint, trusted=True) == []


def test_a_checkpoint_without_digests_has_to_be_trusted(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint-5", 5)
    assert check_checkpoint(checkpoint, trusted=False) == []
    for content in (None, {"world_size": 2}):
        (checkpoint / CHECKPOINT_RECORD).unlink()
        if content:
            write_json(checkpoint / CHECKPOINT_RECORD, content)
        (message,) = check_checkpoint(checkpoint, trusted=False)
        assert "runs whatever code is in them" in message and "trust_checkpoint: true" in message
        assert check_checkpoint(checkpoint, trusted=True) == []
        write_json(checkpoint / CHECKPOINT_RECORD, {})


def test_last_is_the_newest_whole_checkpoint(tmp_path):
    run = RunDir(tmp_path)
    for step in (5, 10, 15, 20):
        (make_checkpoint(run.checkpoint(step), step) / "config.json").write_text("{}")
    config = Config(resume_from_checkpoint="last", output_dir=str(tmp_path))
    assert find_base(config) == run.checkpoint(20)
    weights = run.checkpoint(20) / "model-1.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (run.checkpoint(15) / CHECKPOINT_RECORD).write_text("[]")
    assert find_base(config) == run.checkpoint(10)
    assert find_base(config.replace(output_dir=str(tmp_path / "no"))) is None
    assert resume_candidates(config) == [run.checkpoint(step) for step in (20, 15, 10, 5)]


def test_a_run_that_ended_by_itself_is_told_from_a_crash(tmp_path):
    writer = RunWriter(tmp_path)
    assert ended_well(writer.dir), "no run"
    writer.event("start", 0)
    writer.event("log", 1, loss=1.0)
    assert not ended_well(writer.dir)
    writer.event("end", 1, state="stopped")
    assert ended_well(writer.dir)
    writer.event("resume", 1)
    assert not ended_well(writer.dir)


def test_what_differs_between_two_runs_is_named(tmp_path):
    shape = {"world_size": 2, "zero_stage": 3, "use_lora": True}
    assert check_same_shape(tmp_path, shape) == [], "a checkpoint without a record is not compared"
    write_json(tmp_path / CHECKPOINT_RECORD, shape)
    assert check_same_shape(tmp_path, shape) == []
    other = shape | {"world_size": 1, "zero_stage": 2}
    assert check_same_shape(tmp_path, other) == []
    assert not is_resharded(tmp_path, shape)
    found = check_same_shape(tmp_path, shape | {"world_size": 1, "zero_stage": 0, "use_lora": False})
    assert len(found) == 3 and "world_size = 2, this run has 1" in found[0]
    assert "zero_stage = 3, this run has 0" in found[1] and "use_lora" in found[2]
    (found,) = check_same_shape(tmp_path, shape | {"sequence_parallel_size": 2})
    assert "sequence_parallel_size = 1, this run has 2" in found, (
        "also of a checkpoint that is older than the parameter"
    )


def test_the_identity_of_a_base_changes_with_its_content_alone(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    assert base_identity(copy) == base_identity(model) | {"path": str(copy)}
    assert base_identity(copy)["weight_bytes"] == (copy / "model.safetensors").stat().st_size
    (copy / "config.json").write_text("{}")
    assert base_identity(copy)["hash"] != base_identity(model)["hash"]


def test_two_checkpoints_of_one_run_are_two_bases(model, adapter, tmp_path):
    """Their config and headers are the same; their values are not."""
    other = shutil.copytree(model, tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-4000:] = bytes(4000)
    (other / "model.safetensors").write_bytes(weights)
    one, two = base_identity(model), base_identity(other)
    assert one["hash"] == two["hash"] and one["values"] != two["values"]
    assert not same_base(one, two) and same_base(one, one)
    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": str(other)})
    with pytest.raises(ModelError, match=f"trained on another base than {other}"):
        find_base(adapter)
    older = {name: value for name, value in one.items() if name != "values"}
    assert same_base(older, two) and same_base(two, older), "a record without values"


def test_large_files_are_sampled_from_end_to_end(model, tmp_path):
    large = shutil.copytree(model, tmp_path / "large")
    (large / "model.safetensors").unlink()
    path, size = large / "pytorch_model.bin", 40 << 20
    path.write_bytes(bytes(size))
    before = base_identity(large)["values"]
    for place in (0, size // 63 * 20, size - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        changed = base_identity(large)["values"]
        assert changed != before
        before = changed


@pytest.mark.parametrize("content", [[], {"hash": "a"}, {"hash": 3, "path": "p"}])
def test_a_damaged_identity_is_named(adapter, content):
    (adapter / BASE_IDENTITY).write_text(json.dumps(content))
    with pytest.raises(RunError, match=f"{adapter / BASE_IDENTITY}: "):
        find_base(adapter)


def test_the_branch_that_a_resume_leaves_is_moved_aside(tmp_path):
    run = RunDir(tmp_path)
    for step in (5, 10, 15, 20):
        make_checkpoint(run.checkpoint(step), step)
    assert set_aside(run, run.checkpoint(20)) == []
    moved = set_aside(run, run.checkpoint(10))
    folder = tmp_path / "abandoned" / "from-step-10"
    assert moved == [folder / "checkpoint-15", folder / "checkpoint-20"]
    assert all(check_checkpoint(path, trusted=False) == [] for path in moved)
    assert run.checkpoints() == [run.checkpoint(5), run.checkpoint(10)]
    make_checkpoint(run.checkpoint(15), 15)
    assert set_aside(run, run.checkpoint(10)) == [tmp_path / "abandoned" / "from-step-10-2" / "checkpoint-15"]
    other = set_aside(run, moved[1])
    assert [path.parent.name for path in other] == ["from-step-20"] * 2, "all belong to another branch"
    assert run.checkpoints() == []
    assert tmp_path / "abandoned" in run.run_files(), "overwrite_output_dir removes them"


@pytest.mark.parametrize("content", [{}, {"global_step": "5"}, {"global_step": None}])
def test_a_step_that_is_no_number_is_named(tmp_path, content):
    write_json(tmp_path / "trainer_state.json", content)
    with pytest.raises(RunError, match=r"trainer_state\.json: global_step = .*must be an integer"):
        set_aside(RunDir(tmp_path), tmp_path)
