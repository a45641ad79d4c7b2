"""Axes are round, lines honest, and no odd value reaches the SVG."""

import math
import re

import pytest

from carrara.report_chart import Chart, Series, decades, draw, smoothed, thin, ticks
from carrara.report_number import format_value


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(0.31, 9.7) == pytest.approx([2, 4, 6, 8])
    assert decades(0.8, 120) == pytest.approx([1, 10, 100])


def test_thinning_keeps_the_end_and_what_is_lost() -> None:
    points = [(float(x), math.nan if x == 501 else 1.0) for x in range(1000)]
    kept = thin(points, 100)
    assert kept[-1] == points[-1] and points[501] in kept and len(kept) <= 102


@pytest.mark.parametrize(
    "ys", [[1.0], [2.0, 2.0], [0.0, 0.0], [math.nan, math.nan], [-3.0, math.inf, 1e-9, 1e9], [1e-30, 5.0]]
)
def test_chart_of_odd_values_has_only_numbers(ys: list[float]) -> None:
    line = Series("a", [(float(x), y) for x, y in enumerate(ys)])
    figure = str(draw(Chart("t", [line], "steps", format_value, logarithmic=True)))
    numbers = re.findall(r'(?:x|y|x1|x2|y1|y2|cx|cy|d)="([^"]*)"', figure)
    assert numbers and not any(re.search("nan|inf", entry) for entry in numbers)


def test_chart_without_points_is_left_out() -> None:
    assert draw(Chart("t", [Series("a", [])], "steps", format_value)) is None


def test_line_passes_through_its_points() -> None:
    figure = str(draw(Chart("t", [Series("a", [(0.0, 0.0), (50.0, 1.0), (100.0, 0.5)])], "steps", str, percent=True)))
    assert '<path class="line" d="M48.0 162.0L187.0 14.0L326.0 88.0"/>' in figure


def test_line_is_broken_where_a_value_is_lost() -> None:
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, 1.0), (4.0, 2.0)]
    figure = str(draw(Chart("t", [Series("a", points)], "steps", format_value)))
    path = re.search(r'<path class="line" d="([^"]*)"', figure)
    assert path is not None and path[1].count("M") == 2 and figure.count("<title>not a number") == 1


def test_smoothing_of_a_constant_is_the_constant() -> None:
    line = [(float(x), 3.0) for x in range(200)]
    assert [y for _, y in smoothed(line)] == pytest.approx([3.0] * 200)
