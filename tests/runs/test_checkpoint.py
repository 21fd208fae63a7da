"""Checkpoints: which can be resumed, and the base of a Config, a checkpoint, an adapter and a model folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny import tiny_model

from hynb.config import Config
from hynb.errors import ModelError
from hynb.files import write_json
from hynb.runs import BASE_IDENTITY, CHECKPOINT_RECORD, base_identity, check_checkpoint, check_same_shape, find_base


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "hunyuan_v1_dense")


@pytest.fixture
def adapter(model, tmp_path) -> Path:
    folder = tmp_path / "run" / "checkpoint-3"
    folder.mkdir(parents=True)
    write_json(folder / "adapter_config.json", {"base_model_name_or_path": str(model)})
    write_json(folder / BASE_IDENTITY, base_identity(model))
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
    assert "its parent folder has checkpoint-5" in check_checkpoint(tmp_path / "checkpoint-6")[0]
    (message,) = check_checkpoint(tmp_path)
    assert f"not a checkpoint; did you mean {checkpoint}?" in message
    (checkpoint / "trainer_state.json").touch()
    assert "no optimizer state" in check_checkpoint(checkpoint)[0]
    (checkpoint / "global_step5").mkdir()
    assert check_checkpoint(checkpoint) == []


def test_what_differs_between_two_runs_is_named(tmp_path):
    shape = {"world_size": 2, "zero_stage": 3, "use_lora": True}
    assert check_same_shape(tmp_path, **shape) == [], "a checkpoint without a record is not compared"
    write_json(tmp_path / CHECKPOINT_RECORD, shape)
    assert check_same_shape(tmp_path, **shape) == []
    found = check_same_shape(tmp_path, **shape | {"world_size": 1, "use_lora": False})
    assert len(found) == 2 and "world_size = 2, this run has 1" in found[0] and "use_lora" in found[1]
    (found,) = check_same_shape(tmp_path, **shape, sequence_parallel_size=2)
    assert "sequence_parallel_size = 1, this run has 2" in found, (
        "also of a checkpoint that is older than the parameter"
    )


def test_the_identity_of_a_base_changes_with_its_content_alone(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    assert base_identity(copy) == base_identity(model) | {"path": str(copy)}
    assert base_identity(copy)["weight_bytes"] == (copy / "model.safetensors").stat().st_size
    (copy / "config.json").write_text("{}")
    assert base_identity(copy)["hash"] != base_identity(model)["hash"]
