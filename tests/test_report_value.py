"""Which score is shown."""

from pathlib import Path

from carrara.report_folder import read_metrics
from carrara.report_value import read_values


def test_scores_without_a_split_are_held_out() -> None:
    values = read_values(read_metrics(Path("nowhere")), {"scores": {"psnr": 30, "val_seen/psnr": 31.0, "odd": "text"}})
    assert {name: value.value for name, value in values.items()} == {"val/psnr": 30.0, "val_seen/psnr": 31.0}
