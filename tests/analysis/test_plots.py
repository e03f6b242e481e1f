from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from hypothesis import given
from hypothesis import strategies as st

from ditkit.analysis.plots import Point, _linear_ticks, _log_ticks, scatter

POSITIVE = st.floats(1e-9, 1e6)


def point(x: float, y: float, kind: str = "method", title: str = "one") -> Point:
    return Point(x, y, "1", title, kind)


@given(POSITIVE, POSITIVE)
def test_ticks_enclose_the_values(a: float, b: float) -> None:
    low, high = sorted((a, b))
    ticks = _log_ticks(low, high)
    assert ticks == sorted(set(ticks))
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert len(ticks) >= 2
    across = _linear_ticks(high)
    assert across[0] == 0
    assert across[-1] >= high
    assert len(across) <= 9


@given(st.lists(st.tuples(st.floats(0, 3), POSITIVE), min_size=1, max_size=6))
def test_marks_lie_inside_the_picture(values: list[tuple[float, float]]) -> None:
    tree = ElementTree.fromstring(scatter([point(x, y) for x, y in values], "x", "y"))
    circles = tree.findall(".//circle")
    assert len(circles) == len(values)
    for circle in circles:
        assert 0 <= float(circle.attrib["cx"]) <= 520
        assert 0 <= float(circle.attrib["cy"]) <= 340


def test_text_is_escaped() -> None:
    svg = scatter([point(0.5, 0.1, title='<script>"&')], "a < b", 'c "d"')
    assert "<script>" not in svg
    assert ElementTree.fromstring(svg).find(".//title").text == '<script>"&'


def test_what_has_no_place_is_left_out() -> None:
    assert scatter([], "x", "y") == ""
    assert scatter([point(1, 0.0), point(1, float("inf"))], "x", "y") == ""
    svg = scatter([point(1, 0.0), point(0.5, 0.2)], "x", "y")
    assert svg.count("<circle") == 1


def test_fewer_steps_are_joined_by_a_line() -> None:
    plain = [point(0.3, 0.2, "plain"), point(0.6, 0.1, "plain")]
    assert "<polyline" in scatter(plain, "x", "y")
    assert "<polyline" not in scatter(plain[:1], "x", "y")
