"""Draws a run's curves, for the live panel and for the picture that a headless notebook ends with."""

from __future__ import annotations

import base64
import html
import io
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from hynb.runs import RunStatus
from hynb.widgets.table import duration_text, size_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More points than this can't be told apart on the width of a page.
_MAX_POINTS = 1500
_WIDTH_INCHES, _HEIGHT_INCHES = 9.0, 4.6
_DPI = 130
# matplotlib's font cache is shared by the panel's thread and the cell that draws the last picture.
_DRAWING = threading.Lock()


@dataclass(kw_only=True)
class Curve:
    """What the log steps of a run say, one list entry a log step; an absent number is NaN."""

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    memory_bytes: float = math.nan
    tokens: int = 0
    saves: list[int] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)
    eval_loss: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, events: Sequence[dict[str, Any]]) -> Curve:
        """The curve of a run's events in force."""
        curve = cls()
        for event in events:
            if event["kind"] == "save":
                curve.saves.append(event["global_step"])
            if event["kind"] == "eval":
                curve.eval_steps.append(event["global_step"])
                curve.eval_loss.append(_number(event.get("eval_loss")))
            if event["kind"] != "log":
                continue
            curve.steps.append(event["global_step"])
            curve.loss.append(_number(event.get("loss")))
            curve.learning_rate.append(_number(event.get("learning_rate")))
            curve.tokens_per_second.append(_number(event.get("tokens_per_second")))
            curve.step_seconds.append(_number(event.get("step_seconds")))
            curve.memory_bytes = _number(event.get("memory_bytes"))
            curve.tokens = event.get("tokens") or curve.tokens
        return curve

    @property
    def span(self) -> int:
        """Log steps that the smoothed loss looks back over: a tenth of the run, at most 50."""
        return max(1, min(50, len(self.loss) // 10))

    def smoothed(self) -> list[float]:
        """The loss as an exponential mean over `span` log steps, without the start's bias."""
        weight = 2 / (self.span + 1)
        mean, total, smoothed = 0.0, 0.0, []
        for value in self.loss:
            if math.isfinite(value):
                mean = (1 - weight) * mean + weight * value
                total = (1 - weight) * total + weight
            smoothed.append(mean / total if total else math.nan)
        return smoothed

    def seconds_left(self, max_steps: int | None) -> float | None:
        """Time to the last step at the pace of the last 20 log steps; None when it can't be told."""
        pace = [value for value in self.step_seconds[-20:] if math.isfinite(value)]
        if not pace or not max_steps:
            return None
        return median(pace) * max(0, max_steps - self.steps[-1])

    def facts(self, status: RunStatus) -> list[tuple[str, str]]:
        """The newest numbers, each with its name, as panel and table show them."""
        if not self.steps:
            return []
        found = [
            ("loss", f"{self.loss[-1]:.4f} (first {self.loss[0]:.4f}, smoothed {self.smoothed()[-1]:.4f})"),
            ("learning rate", f"{self.learning_rate[-1]:.3g}"),
            ("speed", f"{self.tokens_per_second[-1]:,.0f} tokens/s, {self.step_seconds[-1]:.3g} s a step"),
            ("tokens so far", f"{self.tokens:,}"),
            ("memory", size_text(self.memory_bytes)),
        ]
        if self.eval_steps:
            found.insert(1, ("evaluation loss", self._evaluation_text()))
        return [(name, text) for name, text in found if "nan" not in text]

    def _evaluation_text(self) -> str:
        lowest, at = min(zip(self.eval_loss, self.eval_steps, strict=True))
        text = f"{self.eval_loss[-1]:.4f} at step {self.eval_steps[-1]}"
        return text if at == self.eval_steps[-1] else f"{text} (lowest {lowest:.4f} at step {at})"

    def alt_text(self, status: RunStatus) -> str:
        """The picture in words."""
        if not self.steps:
            return f"No loss yet; the run is {status.state}."
        seconds = self.seconds_left(status.max_steps)
        left = f", about {duration_text(seconds)} left" if status.live and seconds is not None else ""
        evaluated = f"; evaluation loss {self._evaluation_text()}" if self.eval_steps else ""
        return (
            f"Training loss by step: {self.loss[0]:.4f} at step {self.steps[0]}, "
            f"{self.loss[-1]:.4f} at step {self.steps[-1]}{evaluated}; the run is {status}{left}. "
            "Below it learning rate and tokens per second."
        )


def draw(curve: Curve, max_steps: int | None) -> Figure:
    """A figure of loss above, learning rate and tokens per second below; never touches pyplot."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(2.2, 1))
    loss, rate, speed = (figure.add_subplot(place) for place in (grid[0, :], grid[1, 0], grid[1, 1]))
    stride = math.ceil(len(curve.steps) / _MAX_POINTS) or 1
    # The newest point is always there, whatever the stride.
    thinned = slice((len(curve.steps) - 1) % stride if curve.steps else None, None, stride)
    steps = curve.steps[thinned]
    mark = "." if len(steps) < 40 else None
    loss.plot(steps, curve.loss[thinned], color="#1f6feb", alpha=0.45, linewidth=1, marker=mark, label="each step")
    label = f"mean over about {curve.span} log steps"
    loss.plot(steps, curve.smoothed()[thinned], color="#1f6feb", linewidth=2, label=label)
    if curve.eval_steps:
        # Told from the training loss by shape and dashes too, not by its colour alone.
        look = {"color": "#bc4c00", "linestyle": "--", "marker": "D", "markersize": 4}
        loss.plot(curve.eval_steps, curve.eval_loss, linewidth=1.5, label="evaluation", **look)
    for index, step in enumerate(curve.saves):
        name = "checkpoint" if index == 0 else None
        loss.axvline(step, color="#1a7f37", linewidth=1, linestyle=(0, (2, 3)), label=name)
    if curve.steps:
        loss.legend(loc="lower right", bbox_to_anchor=(1, 0.99), ncols=4, frameon=False, fontsize=9)
    loss.set_ylabel("loss")
    rate.plot(steps, curve.learning_rate[thinned], color="#8250df", linewidth=1.5, marker=mark)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    speed.plot(steps, curve.tokens_per_second[thinned], color="#bc4c00", linewidth=1.5, marker=mark)
    speed.set_ylabel("tokens/s")
    speed.set_xlabel("step")
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (loss, rate, speed):
        axes.set_xlim(0, max(max_steps or 0, curve.steps[-1] if curve.steps else 0) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#888888", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (rate, speed):
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4))
    return figure


def png(curve: Curve, max_steps: int | None, *, transparent: bool) -> bytes:
    """The figure as PNG bytes; may be called from any thread.

    Args:
        transparent: lets the page's colour through; a picture that leaves the notebook is better on white.
    """
    from PIL import Image

    drawn, packed = io.BytesIO(), io.BytesIO()
    with _DRAWING:
        draw(curve, max_steps).savefig(drawn, format="rgba", dpi=_DPI, transparent=transparent)
    size = (round(_WIDTH_INCHES * _DPI), round(_HEIGHT_INCHES * _DPI))
    # Few colours are a quarter of the bytes: each picture goes to the browser, and into the saved notebook.
    picture = Image.frombytes("RGBA", size, drawn.getvalue())
    picture.quantize(96, method=Image.Quantize.FASTOCTREE).save(packed, format="png")
    return packed.getvalue()


def image_tag(content: bytes, alt: str) -> str:
    """An `<img>` that needs no file; in the dark theme its dark lines turn light and keep their hue."""
    data = base64.b64encode(content).decode()
    return (
        "<style>.hynb-plot{width:100%;max-width:" + f"{_WIDTH_INCHES * 100:.0f}" + "px;height:auto}"
        '[data-jp-theme-light="false"] .hynb-plot{filter:invert(0.92) hue-rotate(180deg)}</style>'
        f'<img class="hynb-plot" alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
