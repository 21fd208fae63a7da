"""When a failed run starts again, from what, and on which hosts."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from hynb.config import Config, check_config
from hynb.errors import ClusterError, HynbError
from hynb.files import write_json
from hynb.runs import RunDir, RunReader, RunWriter
from hynb.supervision import Restarts, restart

FAILED = {"state": "failed", "reason": "rank 1 on beta was killed after 12.5 seconds\nThe end of its log:\nx"}
FAILED |= {"host": "beta", "rank": 1}
THREE = ("alpha", "beta", "gamma")


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    found = RunDir(tmp_path / "run")
    found.log.mkdir(parents=True)
    (tmp_path / "hostfile").write_text("".join(f"{name} slots=2\n" for name in THREE))
    return found


@pytest.fixture
def answering(monkeypatch) -> list[str]:
    """The hosts that answer; those that do not are asked once."""
    names = list(THREE)
    monkeypatch.setattr(restart, "unreachable_hosts", lambda config: [name for name in THREE if name not in names])
    monkeypatch.setattr(restart, "_LOOK_SECONDS", 0.0)
    return names


def config_of(run_dir: RunDir, **values) -> Config:
    given = {"output_dir": str(run_dir.path), "hostfile": str(run_dir.path.parent / "hostfile"), "max_restarts": 3}
    return Config(**(given | values))


def at_step(run_dir: RunDir, step: int) -> None:
    RunWriter(run_dir.path).status("failed", global_step=step)


def again(restarts: Restarts, end=FAILED):
    return restarts.after(end, lambda: True)


def test_a_crash_goes_on_from_the_newest_checkpoint_and_as_often_as_allowed(run_dir, answering):
    restarts = Restarts(run_dir, config_of(run_dir, resume_from_checkpoint="/other/checkpoint-9"))
    at_step(run_dir, 7)
    config, first = again(restarts)
    assert config.overwrite_output_dir and config.resume_from_checkpoint == "/other/checkpoint-9"
    assert (first.number, first.checkpoint, first.global_step) == (1, None, 7)
    assert first.reason == "rank 1 on beta was killed after 12.5 seconds"
    run_dir.checkpoint(10).mkdir()
    at_step(run_dir, 12)
    config, second = again(restarts)
    assert config.resume_from_checkpoint == "last" and not config.overwrite_output_dir
    assert asdict(second) == {
        "number": 2,
        "reason": first.reason,
        "global_step": 12,
        "checkpoint": "checkpoint-10",
        "lost_hosts": [],
    }
    at_step(run_dir, 13)
    assert again(restarts)[1].number == 3 and restarts.left == 0
    at_step(run_dir, 14)
    with pytest.raises(HynbError, match="all 3 restarts of max_restarts are used up"):
        again(restarts)


def test_the_same_failure_at_the_same_step_is_not_tried_again(run_dir, answering):
    restarts = Restarts(run_dir, config_of(run_dir))
    at_step(run_dir, 7)
    again(restarts)
    # Other numbers in the reason are no other cause; another rank is one.
    with pytest.raises(HynbError, match="failed at step 7 for this reason before"):
        again(restarts, FAILED | {"reason": FAILED["reason"].replace("12.5", "80")})
    again(restarts, FAILED | {"rank": 0})
    at_step(run_dir, 8)
    again(restarts, FAILED | {"rank": 0})


def test_a_mistake_is_not_tried_again(run_dir, answering):
    record = {"rank": 0, "host": "alpha", "time": 1.0, "reason": "no such file", "exit_code": 2}
    write_json(run_dir.failure(0), record)
    at_step(run_dir, 0)
    with pytest.raises(HynbError, match="has to be changed first"):
        again(Restarts(run_dir, config_of(run_dir)))
    write_json(run_dir.failure(0), record | {"exit_code": 1})
    assert again(Restarts(run_dir, config_of(run_dir)))[1].number == 1


def test_hosts_that_do_not_answer_are_left_out_or_waited_for(run_dir, answering):
    at_step(run_dir, 7)
    answering.remove("beta")
    with pytest.raises(HynbError, match=r"^beta did not answer .* with min_hosts the run would go on without$"):
        Restarts(run_dir, config_of(run_dir)).after(FAILED, lambda: False)
    restarts = Restarts(run_dir, config_of(run_dir, min_hosts=2))
    config, made = again(restarts)
    assert config.include == "alpha@gamma" and made.lost_hosts == ["beta"]
    # It comes back: a later restart begins from what was launched.
    answering.append("beta")
    at_step(run_dir, 9)
    assert again(restarts)[0].include is None
    answering.clear()
    answering.append("alpha")
    at_step(run_dir, 11)
    with pytest.raises(HynbError, match=r"beta, gamma did not answer .*; 1 hosts are left, and min_hosts = 2"):
        restarts.after(FAILED, lambda: False)
    restarts = Restarts(run_dir, config_of(run_dir))

    def comes_back() -> bool:
        answering[:] = THREE
        return True

    assert restarts.after(FAILED, comes_back)[0].include is None


def test_what_is_not_free_yet_is_waited_for(run_dir, monkeypatch):
    asked = []

    def make_plan(config):
        asked.append(config)
        if len(asked) < 3:
            raise ClusterError("beta: 1 of 8 GB are free")
        return "plan"

    monkeypatch.setattr(restart, "make_plan", make_plan)
    monkeypatch.setattr(restart, "_LOOK_SECONDS", 0.0)
    restarts = Restarts(run_dir, config_of(run_dir))
    assert restarts.plan(config_of(run_dir), lambda: True) == "plan" and len(asked) == 3
    asked.clear()
    with pytest.raises(ClusterError, match="1 of 8 GB"):
        restarts.plan(config_of(run_dir), lambda: False)
    assert len(asked) == 2


def test_single_slots_stay_chosen(run_dir, answering):
    at_step(run_dir, 7)
    answering.remove("gamma")
    config = config_of(run_dir, min_hosts=1, include="alpha:1@beta@gamma")
    assert again(Restarts(run_dir, config))[0].include == "alpha:1@beta"
    config = config_of(run_dir, min_hosts=1, exclude="beta:0")
    changed = again(Restarts(run_dir, config))[0]
    assert (changed.include, changed.exclude) == ("alpha@beta:1", None)


def test_parameters_without_effect_are_refused(run_dir):
    config = config_of(run_dir, model_name_or_path="m", train_data_file="d")
    assert check_config(config) == []
    for values, says in (
        ({"min_hosts": 1, "max_restarts": 0}, "min_hosts = 1: has an effect on restarts alone"),
        ({"min_hosts": 1, "hostfile": None}, "min_hosts = 1: needs a hostfile"),
        ({"min_hosts": 1, "launcher": "slurm"}, "launcher = slurm cannot ask the hosts"),
        ({"launcher": "no_ssh"}, "nobody is there to paste the lines again"),
    ):
        (problem,) = check_config(config.replace(**values))
        assert says in problem


def test_a_failed_run_whose_supervisor_decides_is_live(run_dir):
    at_step(run_dir, 7)
    process = json.loads(run_dir.status.read_text())["process"]
    launch = {"id": "0" * 32, "process": process, "restarts_left": 1}
    write_json(run_dir.launch, launch)
    status = RunReader(run_dir.path).status()
    assert status.live and "may start again by itself" in status.reason and status.global_step == 7
    write_json(run_dir.exit, {"state": "failed", "id": "0" * 32, "reason": "x"})
    assert not RunReader(run_dir.path).status().live
    run_dir.exit.unlink()
    write_json(run_dir.launch, launch | {"restarts_left": 0})
    assert not RunReader(run_dir.path).status().live
    write_json(run_dir.launch, launch | {"process": process | {"start_ticks": process["start_ticks"] + 1}})
    assert RunReader(run_dir.path).status().state == "failed"
