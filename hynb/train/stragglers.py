"""Ranks that make the others wait: slower at computing, or at reading their data, than most.

Ranks of a step begin and end it together, so the time of a step names no one. Compared is what a rank does alone:
the forward passes of some linear layers, between the collectives that DeepSpeed puts around them, per token that it
computes; and its wait for data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any, Literal

import torch

from hynb.train.moments import now, seconds_between

# So many steps are compared at a time, and so much longer than the median is a straggler.
_STEPS = 20
_SHARE = 0.3
# Each fifth step is measured, in so many layers: two marks each in the device's stream.
_EVERY = 5
_LAYERS = 16
# A pass over few tokens takes longer per token: a rank with fewer than the median by this factor is not judged.
_BALANCE = 1.2


class OwnTime:
    """The time that this rank takes for the forward passes of some of its linear layers."""

    def __init__(self) -> None:
        self._step = 0
        self._measures = False
        self._begin: Any = None
        self._spans: list[tuple[Any, Any]] = []
        self._seconds = 0.0
        self._tokens = 0

    def attach(self, model: torch.nn.Module) -> None:
        """Measures a model from now on; called once DeepSpeed has put its own hooks around the layers.

        Args:
            model: its linear layers are those of type `torch.nn.Linear`; a model without any is not measured.
        """
        # An adapter's layers are too small: the start of their kernels would be measured.
        layers = [
            layer for name, layer in model.named_modules() if type(layer) is torch.nn.Linear and "lora_" not in name
        ]
        for layer in layers[:: max(1, len(layers) // _LAYERS)][:_LAYERS]:
            # Behind the hook that gathers the layer's weights, and before the one that lets go of them.
            layer.register_forward_pre_hook(self._before)
            layer.register_forward_hook(self._after, prepend=True)

    def begin_step(self) -> None:
        """The micro batches from now on belong to another step."""
        # Not the first one, in which a device starts its libraries.
        self._step += 1
        self._measures = self._step % _EVERY == 0
        if self._measures:
            self._add_spans()

    def take(self) -> tuple[float, int]:
        """Seconds and tokens, summed over the measured layers since the last call."""
        self._add_spans()
        found = self._seconds, self._tokens
        self._seconds, self._tokens = 0.0, 0
        return found

    def _add_spans(self) -> None:
        self._seconds += sum(seconds_between(begin, end) for begin, end in self._spans)
        self._spans = []

    def _before(self, layer: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        # Not in an evaluation, whose batches follow the last step.
        self._begin = now() if self._measures and layer.training else None

    def _after(self, layer: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self._begin is not None:
            self._spans.append((self._begin, now()))
            self._tokens += output.shape[:-1].numel()
            self._begin = None


@dataclass(kw_only=True, frozen=True)
class Straggler:
    """A rank that makes the others wait.

    Args:
        host: where it runs.
        part: what it is slow at.
        share: its time for that by the median of all ranks; for data the share of a step that it waits longer.
        first_step, last_step: the steps that were compared.
    """

    rank: int
    host: str
    part: Literal["computing", "data"]
    share: float
    first_step: int
    last_step: int

    def __str__(self) -> str:
        where = f"rank {self.rank} on {self.host}"
        steps = f"(steps {self.first_step} to {self.last_step})"
        if self.part == "data":
            return f"{where} waits for its data {self.share:.0%} of a step longer than most {steps}"
        return f"{where} takes {self.share:.2f} times as long to compute a token as most {steps}"


class Stragglers:
    """Compares the ranks over some steps at a time.

    Args:
        hosts: of each rank.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._known: set[tuple[int, str]] = set()
        self._reset()

    def add(
        self,
        global_step: int,
        *,
        steps: int,
        step_seconds: float,
        data: Sequence[float],
        computing: Sequence[tuple[float, float]],
    ) -> list[Straggler]:
        """Takes note of the steps since the last call; returns who has become a straggler.

        Args:
            global_step: the last of them.
            steps: their number.
            step_seconds: the mean time of one.
            data: seconds that each rank waited for data in all of them.
            computing: seconds and tokens of each rank, as `OwnTime.take` counts them.
        """
        self._steps += steps
        self._seconds += steps * step_seconds
        self._data = [total + value for total, value in zip(self._data, data, strict=True)]
        if all(tokens and seconds for seconds, tokens in computing):
            self._computing.append(computing)
        if self._steps < _STEPS:
            return []
        first_step = global_step - self._steps + 1
        found = self._new("data", self._slow_at_data(), first_step, global_step)
        found += self._new("computing", self._slow_at_computing() if self._computing else {}, first_step, global_step)
        self._reset()
        return found

    def _new(
        self, part: Literal["computing", "data"], slow: Mapping[int, float], first_step: int, last_step: int
    ) -> list[Straggler]:
        """Those who were not slow at this part when the ranks were compared before."""
        before = self._known
        self._known = {(rank, known) for rank, known in before if known != part} | {(rank, part) for rank in slow}
        return [
            Straggler(
                rank=rank,
                host=self._hosts[rank],
                part=part,
                share=round(share, 3),
                first_step=first_step,
                last_step=last_step,
            )
            for rank, share in slow.items()
            if (rank, part) not in before
        ]

    def _slow_at_data(self) -> dict[int, float]:
        """The share of a step that each slow rank waits longer than the median."""
        usual = median_low(self._data)
        shares = {rank: (seconds - usual) / self._seconds for rank, seconds in enumerate(self._data)}
        return {rank: share for rank, share in shares.items() if share > _SHARE}

    def _slow_at_computing(self) -> dict[int, float]:
        """The time per token of each slow rank, by the median of all ranks."""
        sums = [_usual_sums(reports) for reports in zip(*self._computing, strict=True)]
        usual = median_low([seconds / tokens for seconds, tokens in sums])
        usual_tokens = median_low([tokens for _, tokens in sums])
        shares = {
            rank: seconds / tokens / usual
            for rank, (seconds, tokens) in enumerate(sums)
            if tokens * _BALANCE >= usual_tokens
        }
        return {rank: share for rank, share in shares.items() if share > 1 + _SHARE}

    def _reset(self) -> None:
        self._steps, self._seconds = 0, 0.0
        self._data = [0.0] * len(self._hosts)
        # Of each report in which steps were measured: seconds and tokens of each rank.
        self._computing: list[Sequence[tuple[float, float]]] = []


def _usual_sums(reports: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Seconds and tokens of a rank, without its slowest report: a single pause is no slow rank."""
    if len(reports) > 2:
        reports = sorted(reports, key=lambda report: report[0] / report[1])[:-1]
    return sum(seconds for seconds, _ in reports), sum(tokens for _, tokens in reports)
