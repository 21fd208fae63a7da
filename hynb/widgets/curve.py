"""The numbers of a run's log events as curves, and what they say in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from hynb.files import size_text
from hynb.runs import RunStatus, duration_text, event_number

# The smoothed loss averages over a tenth of the run, and over this many log steps at most.
_MAX_SPAN = 50
# The remaining time is estimated from this many log steps.
_PACE_STEPS = 20
_SHOWN_STRAGGLERS = 3


@dataclass(kw_only=True)
class Curve:
    """What the log events of a run contain, one list entry per event; a missing number is NaN.

    Args:
        newest: the newest log event.
        tokens: number of tokens trained on so far.
        saves: steps of the checkpoints.
        eval_steps, eval_loss: one entry per evaluation.
        spikes: step and loss of each loss far above those before it.
        skipped: steps that were left out because they were not finite.
        stragglers: a text for each rank that was found to make the others wait.
    """

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    newest: dict[str, Any] = field(default_factory=dict)
    tokens: float = 0
    saves: list[int] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)
    eval_loss: list[float] = field(default_factory=list)
    spikes: list[tuple[int, float]] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    stragglers: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, events: Sequence[dict[str, Any]]) -> Curve:
        """The curves of a run's events."""
        curve = cls()
        for event in events:
            if event["kind"] == "save":
                curve.saves.append(event["global_step"])
            elif event["kind"] == "spike":
                curve.spikes.append((event["global_step"], _number(event.get("loss"))))
            elif event["kind"] == "straggler":
                curve.stragglers.append(str(event.get("text")))
            elif event["kind"] == "skipped":
                curve.skipped.append(event["global_step"])
            elif event["kind"] == "eval":
                curve.eval_steps.append(event["global_step"])
                curve.eval_loss.append(_number(event.get("eval_loss")))
            elif event["kind"] == "log":
                curve.steps.append(event["global_step"])
                curve.loss.append(_number(event.get("loss")))
                curve.learning_rate.append(_number(event.get("learning_rate")))
                curve.tokens_per_second.append(_number(event.get("tokens_per_second")))
                curve.step_seconds.append(_number(event.get("step_seconds")))
                curve.newest = event
                tokens = _number(event.get("tokens"))
                curve.tokens = tokens if tokens > 0 else curve.tokens
        return curve

    @property
    def span(self) -> int:
        """The number of log steps that the smoothed loss averages over."""
        return max(1, min(_MAX_SPAN, len(self.loss) // 10))

    def smoothed(self) -> list[float]:
        """The loss as an exponential moving average over `span` log steps, corrected for the bias of its start."""
        weight = 2 / (self.span + 1)
        mean, total, smoothed = 0.0, 0.0, []
        for value in self.loss:
            if math.isfinite(value):
                mean = (1 - weight) * mean + weight * value
                total = (1 - weight) * total + weight
            smoothed.append(mean / total if total else math.nan)
        return smoothed

    def lowest_loss(self) -> tuple[float, int] | None:
        """The lowest loss and its step; None without a finite loss."""
        finite = [pair for pair in zip(self.loss, self.steps, strict=True) if math.isfinite(pair[0])]
        return min(finite, default=None)

    def seconds_left(self, max_steps: int | None) -> float | None:
        """The time to the last step at the pace of the newest log steps; None if it cannot be estimated."""
        pace = [value for value in self.step_seconds[-_PACE_STEPS:] if math.isfinite(value)]
        if not pace or not max_steps:
            return None
        return median(pace) * max(0, max_steps - self.steps[-1])

    def facts(self) -> list[tuple[str, str]]:
        """The newest numbers, each with its name, as panel and table show them."""
        if not self.steps:
            return []
        found = [
            ("loss", self._loss_text()),
            ("learning rate", f"{self.learning_rate[-1]:.3g}"),
            ("speed", f"{self.tokens_per_second[-1]:,.0f} tokens/s{self._share_text()}"),
            ("step", f"{self.step_seconds[-1]:.3g} s{self._parts_text()}"),
            ("tokens so far", f"{self.tokens:,.0f}"),
            ("memory", size_text(_number(self.newest.get("memory_bytes"))) + self._rank_text()),
            ("GPU utilisation", self._utilisation_text()),
        ]
        if self.eval_steps:
            found.insert(1, ("evaluation loss", self._evaluation_text()))
        if self.skipped:
            found.insert(1, ("steps left out", f"{len(self.skipped)}, not finite (last: step {self.skipped[-1]})"))
        if self.spikes:
            found.insert(1, ("loss spikes", f"{len(self.spikes)} (last: step {self.spikes[-1][0]})"))
        known = [(name, text) for name, text in found if name == "loss" or "nan" not in text]
        return known + [("slow", text) for text in self.stragglers[-_SHOWN_STRAGGLERS:]]

    def _loss_text(self) -> str:
        """The newest loss, which may be none, with the first and the smoothed one."""
        if not math.isfinite(self.loss[-1]):
            return f"{self.loss[-1]} at step {self.steps[-1]}: not finite"
        first = next(value for value in self.loss if math.isfinite(value))
        return f"{self.loss[-1]:.4f} (first {first:.4f}, smoothed {self.smoothed()[-1]:.4f})"

    def alt_text(self, status: RunStatus) -> str:
        """The plot in words, for those who cannot see it."""
        if not self.steps:
            return f"No loss yet; the run is {status.state}."
        seconds = self.seconds_left(status.max_steps)
        left = f", about {duration_text(seconds)} left" if status.live and seconds is not None else ""
        evaluation = f"; evaluation loss {self._evaluation_text()}" if self.eval_steps else ""
        bad = sum(not math.isfinite(value) for value in self.loss)
        evaluation += f"; not finite at {bad} log steps" if bad else ""
        evaluation += f"; {len(self.spikes)} spikes" if self.spikes else ""
        return (
            f"Training loss by step: {self.loss[0]:.4f} at step {self.steps[0]}, "
            f"{self.loss[-1]:.4f} at step {self.steps[-1]}{evaluation}; the run is {status}{left}. "
            "Below it the learning rate and the tokens per second."
        )

    def _share_text(self) -> str:
        """The speed of each rank, and the share of its device's peak."""
        per_rank, mfu = _number(self.newest.get("tokens_per_second_per_rank")), _number(self.newest.get("mfu"))
        text = f" ({per_rank:,.0f} per rank)" if per_rank < self.tokens_per_second[-1] else ""
        return text + (f", {mfu:.0%} of the GPU's peak (MFU)" if math.isfinite(mfu) else "")

    def _parts_text(self) -> str:
        """The parts of a step that take a hundredth of it or more."""
        parts = self.newest.get("seconds_by_part")
        shares = {
            name: _number(value) / self.step_seconds[-1]
            for name, value in (parts.items() if isinstance(parts, dict) else ())
            if self.step_seconds[-1] > 0
        }
        text = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.01)
        return f" ({text})" if text else ""

    def _rank_text(self) -> str:
        """The rank with the most memory, where there are several."""
        several = len(self.newest.get("memory_bytes_per_rank") or ()) > 1
        return f" on rank {self.newest.get('memory_rank')}, the most" if several else ""

    def _utilisation_text(self) -> str:
        """The mean over the GPUs, and the least busy one where there are several."""
        given = self.newest.get("gpu_utilisation_per_rank")
        percent = [_number(value) for value in (given if isinstance(given, list) else ())] or [math.nan]
        lowest = min(percent)
        several = f" (lowest: {lowest:.0f}% on rank {percent.index(lowest)})" if len(percent) > 1 else ""
        return f"{sum(percent) / len(percent):.0f}%{several}"

    def _evaluation_text(self) -> str:
        # NaN compares as neither smaller nor larger.
        lowest, step = min(
            zip(self.eval_loss, self.eval_steps, strict=True), key=lambda pair: (pair[0] != pair[0], pair)
        )
        text = f"{self.eval_loss[-1]:.4f} at step {self.eval_steps[-1]}"
        return text if step == self.eval_steps[-1] else f"{text} (lowest {lowest:.4f} at step {step})"


def _number(value: Any) -> float:
    number = event_number(value)
    return math.nan if number is None else number
