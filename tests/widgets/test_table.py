"""Tables as text and as HTML, sizes and durations."""

from __future__ import annotations

from hynb.files import size_text
from hynb.runs import duration_text
from hynb.widgets.table import Table


def test_sizes_and_durations_are_rounded_with_their_unit():
    assert [size_text(value) for value in (0, 999, 1000, 676_000_000, 777e9, 2.5e12)] == [
        *("0 B", "999 B", "1 kB", "676 MB", "777 GB", "2.5 TB"),
    ]
    assert [duration_text(value) for value in (4.4, 95, 7500, 200_000)] == [
        *("4 s", "1 min 35 s", "2 h 5 min", "2.3 days"),
    ]


def test_a_table_is_aligned_as_text_and_escaped_as_html():
    table = Table(columns=("名字", "b"), rows=[("x", "<1>"), ("车系", "2")], title="T", chosen=1)
    lines = repr(table).splitlines()
    assert lines == ["T", "名字  b", "----  ---", "x     <1>", "车系  2  <-"]
    assert "&lt;1&gt;" in table.html() and "<1>" not in table.html()
    assert table.html().count("<tr") == 3 and table.html().count('class="chosen"') == 1
