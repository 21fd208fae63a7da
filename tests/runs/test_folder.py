"""The files of a run folder."""

from __future__ import annotations

import os
import stat

from hynb.runs import RunDir


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_folder_is_for_its_owner_alone_or_for_the_group_too(tmp_path):
    old = os.umask(0o022)
    try:
        run_dir = RunDir(tmp_path / "runs" / "first")
        run_dir.create()
        assert mode(run_dir.path) == 0o700 and mode(tmp_path / "runs") == 0o755
        run_dir.create(group_readable=True)
        assert mode(run_dir.path) == 0o750
        run_dir.create()
        assert mode(run_dir.path) == 0o750
        (tmp_path / "shared").mkdir()
        (tmp_path / "shared").chmod(0o2755)
        shared = RunDir(tmp_path / "shared" / "run")
        shared.create(group_readable=True)
        assert mode(shared.path) == 0o2750
        (tmp_path / "there").mkdir(mode=0o775)
        before = mode(tmp_path / "there")
        RunDir(tmp_path / "there").create(group_readable=True)
        assert mode(tmp_path / "there") == before, "a folder that was there keeps its mode"
    finally:
        os.umask(old)


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
