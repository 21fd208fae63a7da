"""Checkpoints of real runs are sealed by all ranks: every file is listed with its size and digest."""

from __future__ import annotations

import pytest
from training_runs import SAVED, STEPS, config_of

from hynb.config import to_yaml
from hynb.files import read_json
from hynb.runs import CHECKPOINT_RECORD, RunDir, check_files, checkpoint_files

LORA = {"use_lora": True, "deepspeed": "ds_zero3_no_offload"}


@pytest.mark.parametrize("values", [LORA, {}], ids=["LoRA, ZeRO-3", "full, ZeRO-2"])
def test_a_record_lists_every_file_with_its_digest(files, ranks, tmp_path, values):
    run = ranks.train(config_of(files, "hunyuan_v1_dense", tmp_path / "run", **values))
    losses = {event["global_step"]: event["loss"] for event in run.events() if event["kind"] == "log"}
    for step in (SAVED, STEPS):
        checkpoint = run.dir.checkpoint(step)
        record = read_json(checkpoint / CHECKPOINT_RECORD) or {}
        assert list(record["files"]) == sorted(checkpoint_files(checkpoint))
        assert check_files(checkpoint, deep=True) == []
        assert (record["global_step"], record["loss"]) == (step, pytest.approx(losses[step], abs=1e-4))
        assert record["saved_at"] == pytest.approx((checkpoint / CHECKPOINT_RECORD).stat().st_mtime, abs=60)
    saves = [event for event in run.events() if event["kind"] == "save"]
    assert all(set(event["seconds_by_part"]) == {"weights", "optimizer", "digests"} for event in saves)


def test_a_rank_that_cannot_read_a_file_leaves_no_checkpoint(files, ranks, tmp_path):
    config = config_of(files, "hunyuan_v1_dense", tmp_path / "run", **LORA)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    done = ranks.run(tmp_path / "run.yaml", ranks=2, before="training_runs:fail_digests_of_rank_1")
    assert done.returncode != 0
    assert "cannot be written by rank 1 on" in done.stderr and "Input/output error" in done.stderr
    assert "Traceback" not in done.stderr
    run = RunDir(tmp_path / "run")
    assert [path.name for path in run.checkpoints()] == [f"checkpoint-{SAVED}"], "the previous one is intact"
    assert check_files(run.checkpoint(SAVED), deep=True) == []
