"""Resuming: the newest whole checkpoint is taken, damaged ones are named, what is not proven has to be trusted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from training_runs import SAVED, STEPS, config_of, losses

from hynb.config import Config, to_yaml
from hynb.errors import ConfigError
from hynb.launch import attach
from hynb.runs import CHECKPOINT_RECORD, check_run

MORE = STEPS + SAVED


@pytest.fixture(scope="module")
def finished(files, ranks, tmp_path_factory):
    """The folder of a run with two checkpoints, and its Config."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = config_of(files, "hunyuan_v1_dense", folder, use_lora=True)
    ranks.train(config)
    return config


@pytest.fixture
def run(finished, tmp_path) -> Config:
    """A copy of it that may be changed, and a Config that resumes it."""
    shutil.copytree(finished.output_dir, tmp_path / "run")
    return finished.replace(output_dir=str(tmp_path / "run"), resume_from_checkpoint="last")


def crash(config: Config) -> None:
    """Makes the last run of a folder look as if it had not ended by itself."""
    events = attach(config.output_dir).dir.events
    lines = [line for line in events.read_text().splitlines() if '"end"' not in line]
    events.write_text("\n".join(lines) + "\n")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def state_file(config: Config, step: int) -> Path:
    """A file of one rank's optimizer state."""
    return sorted(attach(config.output_dir).dir.checkpoint(step).glob("global_step*/*optim_states.pt"))[-1]


def refused(ranks, config: Config, tmp_path: Path) -> str:
    """What a run says that does not start."""
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    done = ranks.run(tmp_path / "run.yaml", ranks=2)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_truncated_checkpoint_is_passed_over_and_named(finished, run, ranks):
    weights = attach(run.output_dir).dir.checkpoint(STEPS) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    resumed = ranks.train(run)
    (event,) = [event for event in resumed.events() if event["kind"] == "resume"]
    assert event["global_step"] == SAVED and event["checkpoint"].endswith(f"checkpoint-{SAVED}")
    assert any(str(weights) in text for text in event["skipped"])
    assert f"{weights}: has " in resumed.reader.log_tail(500) and "passed over" in resumed.reader.log_tail(500)
    assert losses(resumed) == losses(attach(finished.output_dir))


def test_after_a_crash_every_digest_is_compared(run, ranks):
    flip(state_file(run, STEPS))
    crash(run)
    resumed = ranks.train(run)
    (event,) = [event for event in resumed.events() if event["kind"] == "resume"]
    assert event["global_step"] == SAVED
    assert "optim_states.pt: its content has changed" in event["skipped"][0]


def test_a_named_checkpoint_that_is_damaged_is_refused_with_its_file(run, ranks, tmp_path):
    folder = attach(run.output_dir).dir.checkpoint(SAVED)
    config = run.replace(resume_from_checkpoint=str(folder))
    path = state_file(run, SAVED)
    flip(path)
    crash(run)
    assert f"{path}: its content has changed" in refused(ranks, config, tmp_path)
    path.unlink()
    assert f"{path}: is missing" in refused(ranks, config, tmp_path)


def test_a_checkpoint_without_a_record_has_to_be_trusted(run, ranks, tmp_path):
    folder = attach(run.output_dir).dir.checkpoint(SAVED)
    (folder / CHECKPOINT_RECORD).unlink()
    config = run.replace(resume_from_checkpoint=str(folder))
    assert "allow it with trust_checkpoint: true" in refused(ranks, config, tmp_path)
    resumed = ranks.train(config.replace(trust_checkpoint=True))
    assert list(losses(resumed)) == list(range(1, STEPS + 1))


def test_no_whole_checkpoint_is_a_message(run, ranks, tmp_path):
    for step in (SAVED, STEPS):
        state_file(run, step).unlink()
    message = refused(ranks, run, tmp_path)
    assert (
        message.count("optim_states.pt: is missing") == 2 and f"no checkpoint in {run.output_dir} is whole" in message
    )


def test_going_back_keeps_the_new_checkpoints(run, ranks):
    """In the folder of a run with checkpoints 3 and 6, from 3, with room for one: 6 is of another branch."""
    folder = attach(run.output_dir).dir
    shutil.copytree(folder.checkpoint(STEPS), folder.checkpoint(30))
    config = run.replace(resume_from_checkpoint=str(folder.checkpoint(SAVED)), save_steps=1, save_total_limit=2)
    resumed = ranks.train(config)
    assert [path.name for path in resumed.checkpoints()] == ["checkpoint-5", "checkpoint-6"]
    (event,) = [event for event in resumed.events() if event["kind"] == "resume"]
    aside = folder.path / "abandoned" / "from-step-3"
    assert event["abandoned"] == [str(aside / "checkpoint-6"), str(aside / "checkpoint-30")]
    assert f"were moved to {aside}" in resumed.reader.log_tail(500)
    assert all((aside / name / CHECKPOINT_RECORD).is_file() for name in ("checkpoint-6", "checkpoint-30"))


@pytest.mark.parametrize("max_steps", [STEPS, STEPS - 1])
def test_a_finished_run_trains_nothing(run, ranks, tmp_path, max_steps):
    folder = attach(run.output_dir).dir
    before = {path: path.stat().st_mtime_ns for path in folder.checkpoint(STEPS).rglob("*")}
    message = refused(ranks, run.replace(max_steps=max_steps), tmp_path)
    assert f"max_steps = {max_steps}: the checkpoint {folder.checkpoint(STEPS)} is of step {STEPS}" in message
    assert {path: path.stat().st_mtime_ns for path in folder.checkpoint(STEPS).rglob("*")} == before
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-3", "checkpoint-6"]


def rates(run) -> dict[int, float]:
    """The learning rate of each logged step."""
    return {event["global_step"]: event["learning_rate"] for event in run.events() if event["kind"] == "log"}


@pytest.mark.parametrize("preset", ["ds_zero2_no_offload", "ds_zero3_no_offload"])
def test_an_allowed_change_is_obeyed_from_the_first_step(files, ranks, tmp_path, preset):
    values = {"deepspeed": preset, "min_lr": None, "weight_decay": 0.0}
    whole = ranks.train(config_of(files, "hunyuan_v1_dense", tmp_path / "whole", **values))
    changed = {"learning_rate": 5e-3, "weight_decay": 0.25, "max_grad_norm": 0.5}
    config = config_of(files, "hunyuan_v1_dense", tmp_path / "resumed", **(values | changed))
    config = config.replace(resume_from_checkpoint=str(whole.dir.checkpoint(SAVED)), allow_changed=list(changed))
    resumed = ranks.train(config)
    expected = {step: rate / 2 for step, rate in rates(whole).items() if step > SAVED}
    assert rates(resumed) == pytest.approx(expected)
    first = SAVED + 1
    assert losses(resumed)[first] == losses(whole)[first], "before its first update"
    assert losses(resumed)[first + 1] != losses(whole)[first + 1]
    for path in sorted(resumed.dir.checkpoint(STEPS).glob("global_step*/*optim_states.pt")):
        state = torch.load(path, weights_only=False)["optimizer_state_dict"]
        inner = state.get("base_optimizer_state") or state["optimizer_state_dict"]
        groups = inner["param_groups"]
        assert [group["weight_decay"] for group in groups] == [0.25, *[0.0] * (len(groups) - 1)]
        assert {group["initial_lr"] for group in groups} == {5e-3}
        assert state.get("clip_grad", 0.5) == 0.5
    (event,) = [event for event in resumed.events() if event["kind"] == "resume"]
    assert event["changed"] == sorted(changed)
    config = config.replace(output_dir=str(tmp_path / "again"), allow_changed=["max_steps"], max_steps=STEPS + 1)
    again = ranks.train(config.replace(resume_from_checkpoint=str(resumed.dir.checkpoint(STEPS))))
    assert list(losses(again)) == [STEPS + 1], "the new values are the checkpoint's own"


def test_more_steps_change_the_schedule(files, ranks, run):
    config = run.replace(max_steps=MORE, allow_changed=["max_steps"])
    resumed = ranks.train(config)
    plain = ranks.train(config.replace(output_dir=f"{run.output_dir}_whole", resume_from_checkpoint=None))
    assert {step: rate for step, rate in rates(resumed).items() if step > STEPS} == pytest.approx(
        {step: rate for step, rate in rates(plain).items() if step > STEPS}
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 5e-3}, "learning_rate = 0.005, in the run that saved checkpoint-3 0.01: set it back, or "),
        ({"seed": 7}, "allow the change with allow_changed: seed"),
        ({"lora_alpha": 5.0, "allow_changed": ["seed"]}, "allow_changed: lora_alpha"),
        ({"lora_rank": 8, "allow_changed": []}, "lora_rank = 8, in the run that saved checkpoint-3 4: cannot be"),
        ({"bf16": True}, "the states in the checkpoint have the other precision"),
        ({"gradient_accumulation_steps": 2}, "the global batch would be 2 samples instead of 1"),
        ({"allow_changed": ["lora_rank"]}, "allow_changed = lora_rank: not a parameter that a resumed run may"),
        ({"lr_scheduler_type": "linear"}, "allow_changed: lr_scheduler_type"),
    ],
)
def test_what_differs_is_refused_before_anything_starts(run, changes, message):
    checkpoint = str(attach(run.output_dir).dir.checkpoint(SAVED))
    with pytest.raises(ConfigError) as raised:
        check_run(run.replace(resume_from_checkpoint=checkpoint, **changes))
    assert message in str(raised.value)


def test_other_data_is_refused_and_the_same_data_elsewhere_is_not(files, run, ranks, tmp_path):
    config = run.replace(resume_from_checkpoint=str(attach(run.output_dir).dir.checkpoint(SAVED)))
    other = config.replace(train_data_file=str(files["few"]))
    assert "data = " in (message := refused(ranks, other, tmp_path)) and "allow_changed: data" in message
    moved = shutil.copy(files["data"], tmp_path / "moved.jsonl")
    resumed = ranks.train(config.replace(train_data_file=str(moved), logging_steps=1))
    assert "train_data_file = " in resumed.reader.log_tail(500) and ": harmless" in resumed.reader.log_tail(500)
