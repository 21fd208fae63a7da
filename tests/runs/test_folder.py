"""The files of a run folder."""

from __future__ import annotations

from hynb.runs import RunDir


def test_checkpoints_and_logs_are_listed_in_order(tmp_path):
    run_dir = RunDir(tmp_path)
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", "checkpoint-"):
        (tmp_path / name).mkdir()
    assert [path.name for path in run_dir.checkpoints()] == ["checkpoint-9", "checkpoint-10"]
    run_dir.log.mkdir()
    for name in ("20260101000000_rank10", "20260101000000_rank2", "20260102000000_rank2", "launcher"):
        (run_dir.log / f"{name}.log").touch()
    logs = ["20260102000000_rank2.log", "20260101000000_rank10.log"]
    assert [path.name for path in run_dir.rank_logs()] == logs
    assert run_dir.rank_log(2) == run_dir.log / logs[0] and run_dir.rank_log(0) is None
