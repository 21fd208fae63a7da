"""The picture of a run."""

from __future__ import annotations

import io
import sys

from PIL import Image

from hynb.widgets.curve import Curve
from hynb.widgets.plot import draw, image_tag, png


def long_run() -> Curve:
    events = [
        {"kind": "log", "global_step": step, "loss": 1 / step, "learning_rate": 1e-4, "tokens_per_second": 9.0}
        for step in range(1, 20_001)
    ]
    return Curve.of([*events, {"kind": "save", "global_step": 500}])


def test_the_figure_has_all_curves_of_a_long_run():
    figure = draw(long_run(), 30_000)
    loss, rate, speed = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "learning rate", "tokens/s"]
    raw, smooth, save = loss.lines
    assert raw.get_alpha() < 1 and raw.get_linewidth() < smooth.get_linewidth()
    assert len(raw.get_xdata()) <= 1500
    assert raw.get_xdata()[-1] == 20_000
    assert save.get_xdata()[0] == 500
    assert rate.get_xlabel() == speed.get_xlabel() == "step"
    assert loss.get_xlim() == (0, 30_000)


def test_the_picture_is_small_and_its_background_white_or_transparent():
    content = png(long_run(), 30_000, transparent=False)
    picture = Image.open(io.BytesIO(content)).convert("RGBA")
    assert picture.width > 1000 and len(content) < 80_000
    assert min(picture.getpixel((3, 3))) > 250
    through = Image.open(io.BytesIO(png(long_run(), 30_000, transparent=True))).convert("RGBA")
    assert through.getpixel((3, 3))[3] == 0
    assert 'alt="a &quot;b&quot;"' in image_tag(content, 'a "b"')
    assert "matplotlib.pyplot" not in sys.modules


def test_evaluations_differ_from_the_training_loss_in_more_than_colour():
    events = [{"kind": "log", "global_step": step, "loss": 1 / step} for step in range(1, 7)]
    evaluations = [
        {"kind": "eval", "global_step": step, "eval_loss": loss} for step, loss in ((2, 0.7), (4, 0.5), (6, 0.6))
    ]
    axes = draw(Curve.of([*events, *evaluations]), 6).axes[0]
    line = next(line for line in axes.lines if line.get_label() == "evaluation")
    assert line.get_xydata().tolist() == [[2, 0.7], [4, 0.5], [6, 0.6]]
    assert line.get_linestyle() == "--" and line.get_marker() == "D"


def test_a_run_without_a_step_can_be_drawn():
    assert png(Curve(), None, transparent=False)
