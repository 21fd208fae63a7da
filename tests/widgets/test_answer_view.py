"""The view of answers while they are written."""

from __future__ import annotations

from shown_html import html_of, text_of

from hynb.widgets.answer_view import AnswerView
from hynb.widgets.tasks import Piece


def write(view: AnswerView, model: int, *parts: tuple[str, str]) -> None:
    for part, text in parts:
        view.show(Piece(model=model, question=0, part=part, text=text))


def test_thought_and_answer_are_apart_and_grow():
    view = AnswerView(("base", "merged"))
    write(view, 0, ("question", "What is\n1 + 1?"), ("thought", "\nOne and "))
    view.flush()
    assert text_of(html_of(view)) == "base, question 1What is\n1 + 1?thoughtOne and…"
    assert view.text == ""
    write(view, 0, ("thought", "one.\n"), ("answer", "\n\nTw"), ("answer", "o."), ("end", ""))
    assert text_of(html_of(view)) == "base, question 1What is\n1 + 1?thoughtOne and one.answerTwo."
    write(view, 1, ("question", "And?"), ("answer", "It never"), ("end", "no end token within 2 tokens"))
    shown = text_of(html_of(view))
    assert "merged, question 1And?answerIt neverno end token within 2 tokens" in shown and "answerTwo." in shown
    assert view.text == (
        "base, question 1: What is\n1 + 1?\nthought: One and one.\nanswer: Two.\n\n"
        "merged, question 1: And?\nanswer: It never [no end token within 2 tokens]"
    )


def test_a_saved_output_without_widgets_is_the_plain_text():
    view = AnswerView(("base",))
    write(view, 0, ("question", "q"), ("answer", "a" * 500), ("end", ""))
    bundle = view._repr_mimebundle_()
    assert bundle["text/plain"] == "base, question 1: q\nanswer: " + "a" * 500
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_a_long_answer_is_sent_a_few_times_a_second_and_in_the_end_whole():
    view = AnswerView(("base",))
    sent = []
    write(view, 0, ("question", "q"))
    view.children[1].children[0].observe(lambda change: sent.append(change.new), names="value")
    write(view, 0, *[("answer", "word ")] * 2000, ("end", ""))
    assert len(sent) < 1000
    assert text_of(sent[-1]).count("word") == 2000
