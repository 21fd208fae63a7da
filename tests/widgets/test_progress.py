"""The bar of a task in another process."""

from __future__ import annotations

from shown_html import EVIL, assert_escaped, html_of, text_of

from hynb.widgets.progress import ProgressBar
from hynb.widgets.tasks import Progress


def test_the_bar_moves_and_one_line_per_tenth_is_printed(capsys):
    bar = ProgressBar("merging")
    for done in range(0, 101):
        bar.show(Progress(done=done, total=100, text="shard-1"))
    assert bar.bar.value == 1.0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"merging: {tenth}0%, shard-1" for tenth in range(1, 11)]
    bar.show(Progress(done=50, total=100, text="shard-1"))
    assert "merging: 50%, shard-1, " in text_of(html_of(bar.box)) and " left" in text_of(html_of(bar.box))
    bar.end(True, "done & good")
    assert bar.bar.bar_style == "success" and "done & good" in text_of(html_of(bar.box))


def test_a_failed_task_leaves_the_bar_where_it_was():
    bar = ProgressBar("checking")
    bar.show(Progress(done=1, total=4, text="tensor 1 of 4"))
    bar.end(False, "different")
    assert (bar.bar.value, bar.bar.bar_style) == (0.25, "danger")


def test_a_task_without_anything_to_do_is_complete(capsys):
    bar = ProgressBar("checking")
    bar.show(Progress(done=0, total=0, text="nothing"))
    assert bar.bar.value == 1.0 and "100%" in capsys.readouterr().out


def test_names_in_the_text_and_in_the_result_are_escaped(capsys):
    """A shard's or a folder's name is part of the text, and may hold any character but a slash."""
    bar = ProgressBar("merging")
    bar.show(Progress(done=50, total=100, text=f"{EVIL}.safetensors"))
    assert_escaped(html_of(bar.box))
    bar.show(Progress(done=100, total=100, text=f"{EVIL}.safetensors"))
    assert_escaped(html_of(bar.box))
    assert EVIL in capsys.readouterr().out, "the printed line is plain text"
    for good in (True, False):
        bar.end(good, f"the model is in {EVIL}")
        assert_escaped(html_of(bar.box))
    bar = ProgressBar(EVIL)
    bar.show(Progress(done=1, total=4, text="shard-1"))
    assert_escaped(html_of(bar.box))
