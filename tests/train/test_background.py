"""Checkpoints in the background: training goes on, the copy is bounded, and the files are those of other saves."""

from __future__ import annotations

import re
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from training_runs import STEPS, config_of, losses
from waiting import wait_until

from hynb.config import to_yaml
from hynb.launch import attach
from hynb.runs import check_files
from hynb.train import background
from hynb.train.background import BackgroundFiles, can_defer, written_in_background

PIECE_BYTES = 1 << 16
LORA = {"use_lora": True, "deepspeed": "ds_zero3_offload"}


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Lets files be written once it is set."""
    opened, plain = threading.Event(), Path.open

    def late(path: Path, mode: str = "r", **options):
        if mode in ("wb", "ab"):
            opened.wait()
        return plain(path, mode, **options)

    monkeypatch.setattr(background.Path, "open", late)
    monkeypatch.setattr(background, "PIECE_BYTES", PIECE_BYTES)
    monkeypatch.setattr(background, "_SMALL_BYTES", PIECE_BYTES // 4)
    return opened


def test_the_copy_is_bounded_and_the_files_are_the_same(gate, tmp_path):
    values = {"large": torch.arange(5 * PIECE_BYTES // 8), "small": torch.ones(3), "text": "x" * 3000}
    values["shared"] = values["large"][3:]
    files = BackgroundFiles(2 * PIECE_BYTES)
    saver = threading.Thread(target=lambda: [torch.save(values, files.open(tmp_path / name)) for name in "ab"])
    saver.start()
    wait_until(lambda: files.held_bytes > PIECE_BYTES)
    saver.join(0.2)
    assert saver.is_alive() and files.held_bytes <= 2 * PIECE_BYTES, "it waits for the disk"
    gate.set()
    saver.join()
    files.wait()
    assert files.held_bytes == 0 and files.paths == [tmp_path / "a", tmp_path / "b"]
    for name in "ab":
        loaded = torch.load(tmp_path / name, weights_only=True)
        assert torch.equal(loaded["large"], values["large"]) and loaded["text"] == values["text"]
        assert loaded["shared"].untyped_storage().data_ptr() == loaded["large"].untyped_storage().data_ptr()


def test_what_was_in_memory_is_not_touched_by_later_steps(gate, tmp_path):
    values = torch.zeros(PIECE_BYTES // 4)
    files = BackgroundFiles(4 * PIECE_BYTES)
    torch.save(values, files.open(tmp_path / "a"))
    values += 1
    gate.set()
    files.wait()
    assert not torch.load(tmp_path / "a", weights_only=True).any()


def test_an_error_of_the_disk_reaches_who_writes_and_who_waits(tmp_path):
    files = BackgroundFiles(PIECE_BYTES)
    file = files.open(tmp_path / "missing" / "a")
    with pytest.raises(FileNotFoundError):
        for _ in range(4):
            file.write(bytes(2 << 20))
    with pytest.raises(FileNotFoundError):
        files.wait()


def test_an_error_of_the_disk_is_not_lost_in_that_of_torch(tmp_path):
    engine = SimpleNamespace(checkpoint_engine=TorchCheckpointEngine())
    assert can_defer(engine)
    engine.checkpoint_engine.zipfile_serialization = True
    files = BackgroundFiles(PIECE_BYTES)
    values = [torch.zeros(2 << 20) for _ in range(3)]
    with pytest.raises(FileNotFoundError, match="missing"), written_in_background(engine, files):
        engine.checkpoint_engine.save(values, str(tmp_path / "missing" / "a"))
    assert type(engine.checkpoint_engine) is TorchCheckpointEngine


@pytest.mark.parametrize("values", [LORA, {"deepspeed": "ds_zero2_no_offload"}], ids=["LoRA, ZeRO-3", "full, ZeRO-2"])
def test_training_goes_on_meanwhile(files, ranks, tmp_path, values):
    """Files that take until the step after the next one: steps between, whole checkpoints, a resume that is exact."""
    config = config_of(files, "hunyuan_v1_dense", tmp_path / "run", **values, save_steps=2, async_save=True)
    run = ranks.train(config, before="training_runs:write_states_two_steps_late")
    order = [(event["kind"], event["global_step"]) for event in run.events() if event["kind"] in ("log", "save")]
    assert order.index(("save", 2)) > order.index(("log", 4)), "two steps while it was written"
    assert [step for kind, step in order if kind == "save"] == [2, 4, STEPS]
    for checkpoint in run.checkpoints():
        assert check_files(checkpoint, deep=True) == []
        assert len(list(checkpoint.glob("global_step*/*_optim_states.pt"))) == 2
    saves = [event for event in run.events() if event["kind"] == "save"]
    assert all({"background", "digests", "optimizer"} <= event["seconds_by_part"].keys() for event in saves)
    expected = losses(run)
    resumed = ranks.train(config.replace(resume_from_checkpoint=str(run.checkpoints()[0]), async_save=False))
    assert losses(resumed) == expected and not resumed.dir.saving.exists()


def test_a_rank_whose_disk_is_full_is_named_by_all(files, ranks, tmp_path):
    config = config_of(files, "hunyuan_v1_dense", tmp_path / "run", **LORA, save_steps=1, async_save=True)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    done = ranks.run(tmp_path / "run.yaml", ranks=2, before="training_runs:fill_disk_of_rank_1_in_background")
    assert done.returncode == 2
    host = re.escape(socket.gethostname())
    assert re.search(rf"checkpoint-2: .*cannot be written by rank 1 on {host}: .*No space left", done.stderr)
    assert "Traceback" not in done.stderr
    run = attach(tmp_path / "run")
    assert [path.name for path in run.checkpoints()] == ["checkpoint-1"]
    assert check_files(run.checkpoints()[0], deep=True) == []


def test_a_run_that_is_to_stop_waits_for_its_checkpoint(files, ranks, tmp_path):
    config = config_of(files, "hunyuan_v1_dense", tmp_path / "run", **LORA, save_steps=100, async_save=True)
    run = ranks.train(config, before="training_runs:stop_after_step_3")
    assert [path.name for path in run.checkpoints()] == ["checkpoint-4"]
    assert run.status().state == "stopped" and "after a checkpoint: checkpoint-4" in run.status().reason
