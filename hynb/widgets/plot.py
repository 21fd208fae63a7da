"""The plot of a run: for the live panel, and for the picture at the end of a headless notebook."""

from __future__ import annotations

import base64
import html
import io
import math
import threading
from typing import TYPE_CHECKING

from hynb.widgets.curve import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More points than these cannot be told apart on the width of a page.
_MAX_POINTS = 1500
# With fewer points than these each one gets a marker.
_MARKED_POINTS = 40
_WIDTH_INCHES, _HEIGHT_INCHES = 9.0, 4.6
_DPI = 130
_PALETTE_COLOURS = 96
_BLUE, _ORANGE, _GREEN, _PURPLE, _RED = "#1f6feb", "#bc4c00", "#1a7f37", "#8250df", "#cf222e"
# matplotlib's font cache is not thread-safe; the panel's thread and a cell may draw at the same time.
_DRAWING = threading.Lock()


def draw(curve: Curve, max_steps: int | None) -> Figure:
    """A figure with the loss above, learning rate and tokens per second below; never touches pyplot."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(2.2, 1))
    loss, rate, speed = (figure.add_subplot(place) for place in (grid[0, :], grid[1, 0], grid[1, 1]))
    shown = _shown_points(curve)
    steps = curve.steps[shown]
    marker = "." if len(steps) < _MARKED_POINTS else None
    _draw_loss(loss, curve, shown, marker)
    rate.plot(steps, curve.learning_rate[shown], color=_PURPLE, linewidth=1.5, marker=marker)
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    speed.plot(steps, curve.tokens_per_second[shown], color=_ORANGE, linewidth=1.5, marker=marker)
    speed.set_ylabel("tokens/s")
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (loss, rate, speed):
        axes.set_xlim(0, max(max_steps or 0, curve.steps[-1] if curve.steps else 0) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(9 if axes is loss else 4, integer=True))
        axes.grid(color="#888888", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (rate, speed):
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4))
    return figure


def png(curve: Curve, max_steps: int | None, *, transparent: bool) -> bytes:
    """The figure as the bytes of a PNG file; may be called from any thread.

    Args:
        transparent: show the page's background; a picture that is seen outside the notebook is better on white.
    """
    from PIL import Image

    drawn, packed = io.BytesIO(), io.BytesIO()
    with _DRAWING:
        draw(curve, max_steps).savefig(drawn, format="rgba", dpi=_DPI, transparent=transparent)
    size = (round(_WIDTH_INCHES * _DPI), round(_HEIGHT_INCHES * _DPI))
    # A palette takes a quarter of the bytes, and each picture is sent to the browser and saved in the notebook.
    picture = Image.frombytes("RGBA", size, drawn.getvalue())
    picture.quantize(_PALETTE_COLOURS, method=Image.Quantize.FASTOCTREE).save(packed, format="png")
    return packed.getvalue()


def image_tag(content: bytes, alt: str) -> str:
    """An `<img>` element that contains a PNG file; in the dark theme its colours are inverted and keep their hue."""
    data = base64.b64encode(content).decode()
    return (
        "<style>.hynb-plot{width:100%;max-width:" + f"{_WIDTH_INCHES * 100:.0f}" + "px;height:auto}"
        '[data-jp-theme-light="false"] .hynb-plot{filter:invert(0.92) hue-rotate(180deg)}</style>'
        f'<img class="hynb-plot" alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'
    )


def _shown_points(curve: Curve) -> slice:
    """Every n-th point, always including the newest."""
    if not curve.steps:
        return slice(0, 0)
    stride = math.ceil(len(curve.steps) / _MAX_POINTS)
    return slice((len(curve.steps) - 1) % stride, None, stride)


def _draw_loss(axes: Axes, curve: Curve, shown: slice, marker: str | None) -> None:
    steps = curve.steps[shown]
    axes.plot(steps, curve.loss[shown], color=_BLUE, alpha=0.45, linewidth=1, marker=marker, label="each step")
    label = "moving average" + (f" over {curve.span} log steps" if curve.span > 1 else "")
    axes.plot(steps, curve.smoothed()[shown], color=_BLUE, linewidth=2, label=label)
    if curve.eval_steps:
        # Told apart from the training loss by markers and dashes, not by the colour alone.
        style = {"color": _ORANGE, "linestyle": "--", "marker": "D", "markersize": 4, "linewidth": 1.5}
        axes.plot(curve.eval_steps, curve.eval_loss, label="evaluation", **style)
    missing = [step for step, value in zip(curve.steps, curve.loss, strict=True) if not math.isfinite(value)]
    if missing or curve.skipped:
        # A line has a gap there, or nothing at all; so they are marked at the lower edge.
        style = {"color": _RED, "marker": "x", "markersize": 6, "linestyle": "none", "clip_on": False}
        steps_without = sorted({*missing, *curve.skipped})
        axes.plot(
            steps_without, [0] * len(steps_without), transform=axes.get_xaxis_transform(), label="not finite", **style
        )
    if curve.spikes:
        style = {"color": _RED, "marker": "^", "markersize": 7, "markerfacecolor": "none", "linestyle": "none"}
        axes.plot(*zip(*curve.spikes, strict=True), label="spike", **style)
    for index, step in enumerate(curve.saves):
        label = "checkpoint" if index == 0 else None
        axes.axvline(step, color=_GREEN, linewidth=1, linestyle=(0, (2, 3)), label=label)
    if curve.steps:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.99), ncols=6, frameon=False, fontsize=9)
    axes.set_ylabel("loss")
