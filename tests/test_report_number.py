"""Numbers written for people."""

import math

import pytest

from carrara.report_number import format_count, format_value, interval


def test_numbers_for_people() -> None:
    assert format_value(0.875, "share") == "87.5\u202f%"
    assert format_value(math.nan, "share") == format_value(math.inf) == "not a number"
    assert (
        format_value(-0.00123) == "\u22120.00123" and format_value(12800) == "12\u202f800" and format_value(3.0) == "3"
    )
    assert [format_count(v) for v in (0, 950, 12800, 3e6, 2e9)] == ["0", "950", "12.8k", "3M", "2G"]


def test_interval_is_wilsons() -> None:
    low, high = interval(0.5, 100)
    assert (low, high) == pytest.approx((0.40383, 0.59617), abs=1e-4)
    assert interval(1.0, 10)[1] == 1.0 and interval(0.0, 10)[1] == pytest.approx(0.2775, abs=1e-3)
