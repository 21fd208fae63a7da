"""Ranks that make the others wait are named, with their hosts; the waiting ones are not."""

from __future__ import annotations

import socket
import statistics

import torch
from training_runs import config_of

from hynb.runs import notice_line
from hynb.train.stragglers import OwnTime, Stragglers

HOSTS = ["alpha", "alpha", "beta", "beta"]


def add(
    stragglers: Stragglers, step: int, *, steps: int = 20, data=(0, 0, 0, 0), per_token=(1, 1, 1, 1)
) -> list[str]:
    """The texts for some steps of a second each."""
    computing = [(seconds * steps, 1000 * steps) for seconds in per_token]
    found = stragglers.add(
        step, steps=steps, step_seconds=1.0, data=[value * steps for value in data], computing=computing
    )
    return [str(one) for one in found]


def test_who_is_a_straggler():
    stragglers = Stragglers(HOSTS)
    assert add(stragglers, 20, per_token=(1, 1.2, 0.9, 1.29), data=(0, 0.29, 0.1, 0)) == []
    assert add(stragglers, 40, per_token=(1, 1.1, 1.5, 1), data=(0.1, 0, 0, 0.6)) == [
        "rank 3 on beta waits for its data 60% of a step longer than most (steps 21 to 40)",
        "rank 2 on beta takes 1.50 times as long to compute a token as most (steps 21 to 40)",
    ]
    assert add(stragglers, 60, per_token=(1, 1, 1.6, 1)) == [], "it was named before"
    assert add(stragglers, 80) == []
    assert len(add(stragglers, 100, per_token=(1, 1, 1.6, 1))) == 1, "it had been as fast as the others in between"


def test_twenty_steps_are_compared_however_many_are_logged_at_a_time():
    stragglers = Stragglers(HOSTS)
    slow = (1, 1, 1, 3)
    assert all(add(stragglers, step, steps=1, per_token=slow) == [] for step in range(1, 20))
    assert add(stragglers, 20, steps=1, per_token=slow) == [
        "rank 3 on beta takes 3.00 times as long to compute a token as most (steps 1 to 20)"
    ]
    assert add(Stragglers(HOSTS), 100, steps=100, per_token=slow)[0].endswith("(steps 1 to 100)")


def test_of_two_ranks_the_slower_one_is_named():
    (one,) = Stragglers(["alpha", "beta"]).add(
        20, steps=20, step_seconds=1.0, data=[0, 0], computing=[(1.4, 100), (1.0, 100)]
    )
    assert (one.rank, one.host, one.part, one.share) == (0, "alpha", "computing", 1.4)


def test_a_rank_with_few_tokens_is_not_judged():
    """Half the tokens take as long as all of them, where the start of each kernel is what takes time."""
    of_step = {"steps": 20, "step_seconds": 1.0, "data": [0, 0, 0]}
    assert Stragglers(HOSTS[:3]).add(20, computing=[(1.0, 100), (1.0, 50), (1.0, 100)], **of_step) == []
    (one,) = Stragglers(HOSTS[:3]).add(20, computing=[(1.0, 100), (1.5, 90), (1.0, 100)], **of_step)
    assert one.rank == 1


def test_a_single_pause_is_no_slow_rank():
    stragglers = Stragglers(["alpha", "beta"])
    for step in range(1, 21):
        computing = [(1.0, 100), (50.0 if step == 10 else 1.0, 100)] if step % 5 == 0 else [(0.0, 0), (0.0, 0)]
        assert stragglers.add(step, steps=1, step_seconds=1.0, data=[0, 0], computing=computing) == []


def test_a_rank_that_was_not_measured_is_not_compared():
    found = Stragglers(["alpha", "beta"]).add(
        20, steps=20, step_seconds=1.0, data=[0, 0], computing=[(0.0, 0), (1.0, 100)]
    )
    assert found == []


def test_waiting_in_a_hook_is_not_a_ranks_own_time(monkeypatch):
    """DeepSpeed gathers a layer's weights in hooks that it registers before (runtime/zero/parameter_offload.py)."""
    clock = 0.0

    def wait(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    plain = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, values: (wait(1), plain(self, values))[1])
    monkeypatch.setattr("hynb.train.stragglers.now", lambda: clock)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    for layer in model:
        layer.register_forward_pre_hook(lambda *_: wait(100))
        layer.register_forward_hook(lambda *_: wait(100))
    own = OwnTime()
    own.attach(model)
    for step in range(1, 7):
        own.begin_step()
        model(torch.zeros(2, 3, 8))
        assert own.take() == ((2, 12) if step == 5 else (0, 0)), "each fifth step is measured"
        if step == 5:
            model.eval()
            model(torch.zeros(2, 3, 8))
            assert own.take() == (0, 0), "an evaluation is no step"
            model.train()


def test_slow_ranks_of_a_run_are_named_with_their_hosts(files, ranks, tmp_path):
    values = {
        "max_steps": 20,
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "num_processes": 3,
        "per_device_train_batch_size": 4,
    }
    config = config_of(files, "hunyuan_v1_moe", tmp_path / "run", deepspeed="ds_zero3_no_offload", **values)
    run = ranks.train(config, before="faults.breaking:slow_ranks")
    found = [event for event in run.events() if event["kind"] == "straggler"]
    where = {(event["rank"], event["part"]): event for event in found}
    assert {(1, "computing"), (2, "data")} <= where.keys()
    assert (1, "data") not in where and (0, "data") not in where
    event = where[1, "computing"]
    assert event["host"] == socket.gethostname() and event["share"] > 1.3 and event["global_step"] == 20
    assert notice_line(event) == f"slow: {event['text']}" and event["text"].startswith("rank 1 on ")
    logs = {event["global_step"]: event for event in run.events() if event["kind"] == "log"}
    measured = [log["nanoseconds_per_token_per_rank"] for log in logs.values() if log["global_step"] % 5 == 0]
    # Of all of them: on a busy machine any rank may be slow once.
    times = [statistics.median(of_rank) for of_rank in zip(*measured, strict=True)]
    assert len(times) == 3 and max(times) == times[1]
    assert "nanoseconds_per_token_per_rank" not in logs[16], "each fifth step is measured"
    waited = [sum(times) for times in zip(*(log["data_seconds_per_rank"] for log in logs.values()), strict=True)]
    assert max(waited) == waited[2]
