"""Bad steps: a loss or gradient that is not finite, a loss far above those before it, float16 overflow.

Nothing of it adds a message between the ranks to a good step. A loss that is not finite on one rank makes the
gradient of that rank NaN, so that the norm of the gradient, which DeepSpeed reduces over all ranks before each step,
shows it to all of them; DeepSpeed then leaves the step out (0.19.8, zero/stage_1_and_2.py and stage3.py `step`). Only
then do the ranks compare what they know.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch

from hynb.config import Config
from hynb.data import SeededSampler
from hynb.errors import RankError
from hynb.runs import RunWriter
from hynb.train.datasets import Datasets
from hynb.train.first_not_finite import Found, first_gradient, first_output
from hynb.train.gathering import of_all_ranks
from hynb.train.sequence_parallel import RowParts
from hynb.train.step_samples import StepSamples, shown_samples

# Weights that are damaged make each step bad: that many in a row are not the fault of single samples.
_MOST_SKIPPED_IN_A_ROW = 10
# float16's loss scale is at its minimum: that many overflows in a row are the model's own.
_MOST_OVERFLOWS_AT_MINIMUM = 5
# A spike: so many median absolute deviations above the median of the last losses, and this share of it at least,
# since late in training the deviation may be next to nothing. 8 deviations are 5.4 standard deviations of a normal
# distribution.
SPIKE_WINDOW, SPIKE_LEAST = 50, 20
SPIKE_DEVIATIONS, SPIKE_SHARE = 8.0, 0.1
# After a resume so many losses are compared, by the same measure, with the last ones before it.
JUMP_LOSSES = 3

Forward = Callable[[Any, dict[str, Any]], Any]


@dataclass(kw_only=True, frozen=True)
class Spike:
    """A loss far above those before it.

    Args:
        usual: the median of the losses before it.
        limit: what a loss may be.
    """

    loss: float
    usual: float
    limit: float


def spike(loss: float, before: Sequence[float], *, least: int = SPIKE_LEAST) -> Spike | None:
    """Whether a loss is a spike among those that were logged before it; None if not, or if too few were logged."""
    window = [value for value in before[-SPIKE_WINDOW:] if math.isfinite(value)]
    if len(window) < least or not math.isfinite(loss):
        return None
    usual = median(window)
    deviation = median(abs(value - usual) for value in window)
    limit = usual + max(SPIKE_DEVIATIONS * deviation, SPIKE_SHARE * abs(usual))
    return Spike(loss=loss, usual=usual, limit=limit) if loss > limit else None


class StepWatch:
    """Watches the steps of one rank; every rank has one, and all come to the same decisions.

    Args:
        on_nan, on_spike: the parameters.
        samples: where the samples of a step come from.
        writer: of the run folder; None on other ranks than 0.
        ranks_per_row: ranks that share each row.

    Attributes:
        skipped: steps that were left out in this run so far.
    """

    def __init__(
        self,
        *,
        on_nan: Literal["stop", "skip"],
        on_spike: Literal["mark", "stop"],
        samples: StepSamples,
        writer: RunWriter | None,
        ranks_per_row: int = 1,
    ) -> None:
        self.skipped = 0
        self._on_nan, self._on_spike = on_nan, on_spike
        self._samples = samples
        self._writer = writer
        self._ranks_per_row = ranks_per_row
        self._micro_batches: list[dict[str, Any]] = []
        self._losses: list[torch.Tensor] = []
        self._in_a_row = self._at_minimum = 0
        self._skipped_since_log = 0
        self._logged_step: int | None = None
        self._logged_since_resume: int | None = None

    def attach(self, engine: Any, prepared: Any) -> None:
        """Makes a step with a gradient that is not finite leave the weights alone, where DeepSpeed does not.

        Args:
            engine: DeepSpeed's.
            prepared: accelerate's wrapper of its optimizer, which decides whether the learning rate goes on.
        """
        optimizer = engine.optimizer
        if scaler := getattr(optimizer, "loss_scaler", None):
            # It would end the run at the first overflow, with an Exception.
            scaler.raise_error_at_min_scale = False
        if not hasattr(optimizer, "overflow"):
            # Stage 0 in float32: a plain optimizer.
            _guard(optimizer)
            prepared.__has_overflow__ = True

    def begin(self, inputs: dict[str, Any], *, first: bool) -> None:
        """A micro batch begins.

        Args:
            first: of its step.
        """
        if first:
            self._micro_batches, self._losses = [], []
        self._micro_batches.append(inputs)

    def marked(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss of the present micro batch; its gradient is NaN if it is not finite, and unchanged otherwise."""
        value = loss.detach()
        self._losses.append(value)
        return loss * torch.where(torch.isfinite(value), 1.0, torch.nan).to(loss.dtype)

    def end(self, engine: Any, global_step: int, forward: Forward, model: Any) -> bool:
        """A step has ended; whether it was left out because it was not finite.

        Args:
            global_step: steps before this one.
            forward: computes the loss of a micro batch with DeepSpeed's engine or the model alone.

        Raises:
            RankError: the run cannot go on; the message names the cause, and what to change.
        """
        norm = engine.get_global_grad_norm()
        overflow = bool(getattr(engine.optimizer, "overflow", False))
        if not overflow and (norm is None or math.isfinite(float(norm))):
            self._in_a_row = self._at_minimum = 0
            return False
        bad = [number for number, loss in enumerate(self._losses) if not math.isfinite(loss.item())]
        value = self._losses[bad[0]].item() if bad else math.nan
        reports = of_all_ranks({"bad": bad, "host": socket.gethostname(), "loss": value})
        if engine.fp16_enabled() and not any(report["bad"] for report in reports):
            self._look_at_loss_scale(engine.optimizer, global_step)
            return False
        self._in_a_row += 1
        if self._on_nan == "skip" and overflow and self._in_a_row < _MOST_SKIPPED_IN_A_ROW:
            self._skip(reports, global_step)
            return True
        self._stop(engine, reports, global_step, forward, model)
        raise AssertionError

    def corrected(self, mean_loss: float, global_step: int) -> float:
        """The mean loss of the steps since the last log that were not left out; NaN where all were."""
        steps = global_step - (self._logged_step if self._logged_step is not None else global_step - 1)
        counted = steps - self._skipped_since_log
        if self._skipped_since_log:
            mean_loss = mean_loss * steps / counted if counted > 0 else math.nan
        self._skipped_since_log, self._logged_step = 0, global_step
        return mean_loss

    def resumed(self, global_step: int) -> None:
        """Training begins after this step."""
        self._logged_step = global_step
        self._logged_since_resume = 0 if global_step else None

    def look_for_spike(self, loss: float, before: Sequence[float], global_step: int) -> None:
        """Records a loss that is far above those before it, or ends the run.

        Args:
            before: the losses that were logged before.
            global_step: the number of the step, this one included.

        Raises:
            RankError: under `on_spike: stop`.
        """
        self._look_for_jump(loss, before, global_step)
        found = spike(loss, before)
        if found is None:
            return
        samples = self._samples.step(global_step - 1)
        if self._writer:
            limits = {"loss": loss, "usual_loss": round(found.usual, 6), "limit": round(found.limit, 6)}
            self._writer.event("spike", global_step, **limits, samples=samples)
        if self._on_spike == "stop":
            raise RankError(
                f"step {global_step}: the loss is {loss:.4f}, far above the median of {found.usual:.4f} of the last "
                f"{min(len(before), SPIKE_WINDOW)} losses (limit {found.limit:.4f}; on_spike = stop). Samples of "
                f"this step: {shown_samples(samples)}. Look at them, lower learning_rate or max_grad_norm, or train "
                "on with on_spike: mark",
                rank=0,
                host=socket.gethostname(),
            )

    def _look_for_jump(self, loss: float, before: Sequence[float], global_step: int) -> None:
        """Records that the first losses after a resume are far above those before it."""
        if self._logged_since_resume is None:
            return
        self._logged_since_resume += 1
        if self._logged_since_resume < JUMP_LOSSES:
            return
        self._logged_since_resume = None
        after, earlier = [*before[len(before) - JUMP_LOSSES + 1 :], loss], before[: len(before) - JUMP_LOSSES + 1]
        found = spike(median(after), earlier, least=JUMP_LOSSES)
        if found and self._writer:
            limits = {"usual_loss": round(found.usual, 6), "limit": round(found.limit, 6)}
            self._writer.event("loss_jump", global_step, losses=after, **limits)

    def _look_at_loss_scale(self, optimizer: Any, global_step: int) -> None:
        scale, least = _loss_scale(optimizer)
        self._at_minimum = self._at_minimum + 1 if scale <= least else 0
        if self._at_minimum >= _MOST_OVERFLOWS_AT_MINIMUM:
            raise RankError(
                f"step {global_step + 1}: the gradient has overflowed float16 in {self._at_minimum} steps in a row "
                f"with the smallest loss scale ({scale:g}), so nothing is learnt any more (fp16 = true). Train in "
                "bf16: true where the GPUs have it; otherwise lower learning_rate, or train without fp16",
                rank=0,
                host=socket.gethostname(),
            )

    def _skip(self, reports: Sequence[dict[str, Any]], global_step: int) -> None:
        self.skipped += 1
        self._skipped_since_log += 1
        if self._writer is None:
            return
        ranks = [rank for rank, report in enumerate(reports) if report["bad"]]
        places = [
            place
            for rank in ranks
            for number in reports[rank]["bad"]
            for sample in self._samples.micro_batch(global_step, number, rank // self._ranks_per_row)
            for place in sample
        ]
        places = places or self._samples.step(global_step)
        what = f"the loss of rank {', '.join(map(str, ranks))}" if ranks else "the gradient"
        text = f"step {global_step + 1} is left out on all ranks: {what} is not finite (on_nan = skip)"
        print(f"hynb: {text}; samples: {shown_samples(places)}", flush=True)
        self._writer.event("skipped", global_step + 1, reason=text, ranks=ranks, samples=places, count=self.skipped)
        self._writer.status("running", global_step=global_step, skipped_steps=self.skipped)

    def _stop(
        self,
        engine: Any,
        reports: Sequence[dict[str, Any]],
        global_step: int,
        forward: Forward,
        model: Any,
    ) -> None:
        """Finds the module with one more pass, on all ranks, and ends the run."""
        number = min((min(report["bad"]) for report in reports if report["bad"]), default=None)
        mine = self._look_inside(engine, number, forward, model)
        everywhere = of_all_ranks(mine)
        ranks = [rank for rank, report in enumerate(reports) if number in report["bad"]]
        ranks = ranks or [rank for rank, found in enumerate(everywhere) if found] or [0]
        rank = ranks[0]
        found = everywhere[rank]
        places = self._places(found, number, global_step, rank)
        if number is not None:
            others = f" (and of {len(ranks) - 1} other ranks)" if len(ranks) > 1 else ""
            what = f"the loss of rank {rank}{others} on {reports[rank]['host']} is {reports[rank]['loss']}"
        else:
            what = "the loss is finite, and the gradient is not"
        times = f", the last of {self._in_a_row} such steps in a row" if self._on_nan == "skip" else ""
        raise RankError(
            f"step {global_step + 1}: {what} (on_nan = {self._on_nan}{times}). Samples: {shown_samples(places)}. "
            f"{_where(found)}. {_advice(found, engine, self._on_nan)}",
            rank=rank,
            host=reports[rank]["host"],
        )

    def _look_inside(self, engine: Any, number: int | None, forward: Forward, model: Any) -> Found | None:
        if number is not None:
            inputs = self._micro_batches[number]
            return first_output(model, inputs, lambda: forward(engine, inputs))
        if engine.zero_optimization_stage() == 3:
            # A backward pass would have to gather weights.
            return None
        for inputs in self._micro_batches:
            # The engine would reduce gradients behind its own forward pass.
            if found := first_gradient(model, lambda inputs=inputs: forward(model, inputs)):
                return found
        return None

    def _places(self, found: Found | None, number: int | None, global_step: int, rank: int) -> list[str]:
        if number is None:
            return self._samples.step(global_step)
        batch = self._samples.micro_batch(global_step, number, rank // self._ranks_per_row)
        if found and found.samples:
            batch = [batch[index] for index in found.samples if index < len(batch)]
        places = [place for sample in batch for place in sample]
        if found and found.conversations and self._ranks_per_row == 1:
            places = [places[index] for index in found.conversations if index < len(places)] or places
        return places


def _guard(optimizer: Any) -> None:
    """Makes an optimizer's step leave out gradients that are not finite; they are the same on all ranks."""
    plain = optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        optimizer.overflow = not math.isfinite(norm.item())
        return None if optimizer.overflow else plain(*args, **kwargs)

    optimizer.overflow, optimizer.step = False, step


def _loss_scale(optimizer: Any) -> tuple[float, float]:
    """The present loss scale of float16, and the smallest one; a fixed scale is its own smallest."""
    holder = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
    scale = float(getattr(holder, "cur_scale", 1.0))
    least = getattr(holder, "min_scale", None) or getattr(holder, "min_loss_scale", None)
    return scale, scale if least is None else float(least)


def _where(found: Found | None) -> str:
    if found is None:
        return "In another pass over them all outputs of modules were finite"
    text = str(found)
    return text[0].upper() + text[1:]


def _advice(found: Found | None, engine: Any, on_nan: str) -> str:
    if found and found.weights:
        return (
            "Weights that are not finite cannot be trained: if this is the first step, the base model is damaged "
            "(compare it with its source); otherwise go on from a checkpoint of an earlier step"
        )
    what = ["look at these samples"]
    what += ["use bf16: true instead of fp16"] if engine.fp16_enabled() else []
    what += ["lower learning_rate or raise warmup_ratio"]
    what += ["leave such steps out with on_nan: skip"] if on_nan == "stop" else []
    return f"What to try: {'; '.join(what)}"


def watch_of(
    config: Config, datasets: Datasets, sampler: SeededSampler, parts: RowParts, writer: RunWriter | None
) -> StepWatch:
    """Watches the steps of a run."""
    samples = StepSamples(
        datasets.train,
        sampler,
        micro_batch_size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        replicas=parts.replicas,
    )
    return StepWatch(
        on_nan=config.on_nan,
        on_spike=config.on_spike,
        samples=samples,
        writer=writer,
        ranks_per_row=parts.size,
    )
