"""How long ranks wait for each other, with limits of seconds instead of an hour, and which rank is named."""

from __future__ import annotations

from datetime import timedelta

import pytest
from training_runs import config_of

from hynb.config import Config, check_config, to_yaml
from hynb.launch import attach
from hynb.train.timeouts import save_limit

# Work that takes this long, for a limit far below and one far above.
DELAY_SECONDS = 12
SHORT, LONG = 3 / 60, 3.0


@pytest.fixture
def run(files, ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("DELAY_SECONDS", str(DELAY_SECONDS))

    def start(before, **values):
        values = {"max_steps": 1, "save_steps": 1, "deepspeed": "ds_zero3_offload"} | values
        config = config_of(files, "hunyuan_v1_dense", tmp_path / "run", **values)
        (tmp_path / "run.yaml").write_text(to_yaml(config))
        done = ranks.run(tmp_path / "run.yaml", ranks=2, before=f"training_runs:{before}")
        return done, attach(tmp_path / "run")

    return start


def test_work_that_only_one_rank_has_may_take_longer_than_a_collective_operation(run):
    done, ended = run("slow_work_of_one_rank", collective_timeout_minutes=SHORT, save_timeout_minutes=LONG)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ended.status().state == "finished"


def test_a_save_may_take_longer_than_a_step(run):
    done, ended = run("slow_save_of_rank_1", collective_timeout_minutes=SHORT, save_timeout_minutes=LONG)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name for path in ended.checkpoints()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("before", "limits", "where"),
    [
        (
            "slow_step_of_rank_1",
            {"collective_timeout_minutes": SHORT, "save_timeout_minutes": LONG},
            "(collective_timeout_minutes) to where the other ranks waited, training at step 0",
        ),
        (
            "slow_save_of_rank_1",
            {"collective_timeout_minutes": LONG, "save_timeout_minutes": SHORT},
            "(save_timeout_minutes) to where the other ranks waited, saving at step 1",
        ),
    ],
    ids=["training", "saving"],
)
def test_the_rank_that_is_late_is_named_with_the_phase(run, before, limits, where):
    done, ended = run(before, **limits)
    assert done.returncode == 1
    status = ended.status()
    assert status.state == "failed"
    assert status.reason == f"rank 1 did not come in time {where}"
    assert not ended.checkpoints()


def test_the_limit_of_a_save_follows_its_size():
    hour = timedelta(hours=1)
    assert save_limit(10**9, None, hour) == hour
    # 777 GB of weights twice, and 12 bytes for each of 389e9 parameters.
    assert save_limit(2 * 777 * 10**9 + 12 * 389 * 10**9, None, hour) == timedelta(seconds=62220)
    assert save_limit(10**12, 5, hour) == timedelta(minutes=5)


def test_a_limit_that_deepspeed_would_not_read_is_refused():
    problems = check_config(Config(training_args={"ddp_timeout": 7200}))
    assert any(text.startswith("ddp_timeout = 7200: DeepSpeed does not read it") for text in problems)
    assert any("collective_timeout_minutes to 120" in text for text in problems)
