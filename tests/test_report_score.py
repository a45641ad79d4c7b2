"""Numbers written for people, and which score is shown."""

import math
from pathlib import Path

import pytest

from carrara.report_folder import read_metrics
from carrara.report_score import format_count, format_value, interval, read_values


def test_scores_without_a_split_are_held_out() -> None:
    values = read_values(read_metrics(Path("nowhere")), {"scores": {"psnr": 30, "val_seen/psnr": 31.0, "odd": "text"}})
    assert {name: value.value for name, value in values.items()} == {"val/psnr": 30.0, "val_seen/psnr": 31.0}


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
