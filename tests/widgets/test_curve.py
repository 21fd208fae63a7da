"""The numbers of a run as curves and in words."""

from __future__ import annotations

import math

import pytest

from hynb.runs import RunStatus
from hynb.widgets.curve import Curve
from hynb.widgets.plot import draw


def log_events(steps, **values):
    return [{"kind": "log", "global_step": step, "loss": 1 / step} | values for step in steps]


def test_the_smoothed_loss_starts_at_the_first_loss_and_skips_nan():
    curve = Curve.of(log_events(range(1, 101), loss=3.0))
    assert curve.smoothed() == pytest.approx([3.0] * 100)
    curve.loss[50] = math.nan
    assert curve.smoothed() == pytest.approx([3.0] * 100)


def test_the_remaining_time_follows_the_pace_of_the_newest_steps():
    events = [*log_events(range(1, 30), step_seconds=100.0), *log_events(range(30, 61), step_seconds=2.0)]
    assert Curve.of(events).seconds_left(100) == pytest.approx(80)
    assert Curve.of(events).seconds_left(None) is None
    assert Curve().seconds_left(100) is None


def test_the_last_slow_ranks_are_shown():
    found = [
        {"kind": "straggler", "global_step": 20 * number, "text": f"rank {number} on banana"} for number in range(5)
    ]
    shown = [text for name, text in Curve.of([*log_events([1]), *found]).facts() if name == "slow"]
    assert shown == ["rank 2 on banana", "rank 3 on banana", "rank 4 on banana"]


def test_evaluations_are_shown_in_words():
    evaluations = [
        {"kind": "eval", "global_step": step, "eval_loss": loss} for step, loss in ((2, 0.7), (4, 0.5), (6, 0.6))
    ]
    curve = Curve.of([*log_events(range(1, 7)), *evaluations])
    assert ("evaluation loss", "0.6000 at step 6 (lowest 0.5000 at step 4)") in curve.facts()
    assert "evaluation loss 0.6000 at step 6" in curve.alt_text(RunStatus(state="running", max_steps=6))


def test_the_least_busy_gpu_is_named():
    curve = Curve.of(log_events([1], gpu_utilisation_per_rank=[98, 12, 95]))
    assert dict(curve.facts())["GPU utilisation"] == "68% (lowest: 12% on rank 1)"
    assert "GPU utilisation" not in dict(Curve.of(log_events([1])).facts()), "nothing is known of it on a CPU"


def test_values_that_are_not_numbers_are_left_out():
    """A line of events.jsonl may be of another version, or damaged."""
    curve = Curve.of(
        log_events(
            [1, 2],
            tokens="many",
            memory_bytes=None,
            gpu_utilisation_per_rank=["x"],
            learning_rate=True,
            step_seconds="<b>",
            tokens_per_second=10**400,
        )
    )
    assert [name for name, _ in curve.facts()] == ["loss", "tokens so far"]
    assert dict(curve.facts())["tokens so far"] == "0"


def test_the_lowest_loss_is_a_finite_one():
    curve = Curve.of([*log_events([1, 2, 4]), *log_events([5], loss=math.nan)])
    assert curve.lowest_loss() == (0.25, 4)
    assert Curve.of(log_events([1], loss=math.nan)).lowest_loss() is None


def test_a_run_without_a_loss_is_described_too():
    assert Curve().alt_text(RunStatus(state="starting")) == "No loss yet; the run is starting."
    assert Curve().facts() == []


def test_losses_that_are_not_finite_and_spikes_are_shown():
    events = log_events([1, 2], loss=math.nan)
    curve = Curve.of(events)
    assert curve.facts()[0] == ("loss", "nan at step 2: not finite")
    assert "not finite at 2 log steps" in curve.alt_text(RunStatus(state="failed"))
    events += [*log_events([3], loss=2.0), *log_events([4], loss=math.nan), *log_events([5], loss=9.0)]
    events.append({"kind": "skipped", "global_step": 4})
    curve = Curve.of([*events, {"kind": "spike", "global_step": 5, "loss": 9.0}])
    facts = dict(curve.facts())
    assert facts["loss"].startswith("9.0000 (first 2.0000")
    assert facts["steps left out"] == "1, not finite (last: step 4)" and facts["loss spikes"] == "1 (last: step 5)"
    handles, labels = draw(curve, 10).axes[0].get_legend_handles_labels()
    marks = dict(zip(labels, handles, strict=True))
    assert list(marks["not finite"].get_xdata()) == [1, 2, 4] and list(marks["spike"].get_ydata()) == [9.0]
