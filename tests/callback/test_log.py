import json
import math

import pytest

from carrara.callback.log import JsonLines, counters


def log_of(tmp_path, *steps: int) -> JsonLines:
    log = JsonLines(tmp_path / "metrics.jsonl", batch_size=32, steps_per_epoch=10)
    for step in steps:
        log.log_metrics({"train/loss": 1.0 / step}, step)
    return log


def lines(log: JsonLines) -> list[dict]:
    return [json.loads(line) for line in log.path.read_text().splitlines()]


def test_a_call_is_a_line_with_its_counters(tmp_path):
    log = log_of(tmp_path, 5, 20)
    assert [(row["step"], row["images_seen"], row["epoch"]) for row in lines(log)] == [(5, 160, 1), (20, 640, 2)]
    assert lines(log)[0]["train/loss"] == 0.2
    assert set(lines(log)[0]) == {"step", "images_seen", "epoch", "time", "train/loss"}


def test_lightnings_own_epoch_does_not_replace_ours(tmp_path):
    log = log_of(tmp_path)
    log.log_metrics({"epoch": 99.0, "x": 1}, 30)
    assert lines(log)[0]["epoch"] == 3


def test_a_resumed_run_forgets_what_it_will_log_again(tmp_path):
    log = log_of(tmp_path, 5, 10, 15, 20)
    log.log_metrics({"val/loss": 0.5}, 10)  # a step may have several lines
    log.cut_back(10)
    assert [row["step"] for row in lines(log)] == [5, 10, 10]
    log.log_metrics({"train/loss": 0.1}, 15)
    assert [row["step"] for row in lines(log)] == [5, 10, 10, 15]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", ['{"step": 7, "images_seen": 22', "{", '{"images_seen": 3}\n', "\x00\x00\x00"])
def test_a_line_cut_by_a_kill_is_forgotten(tmp_path, cut):
    log = log_of(tmp_path, 5)
    with log.path.open("a") as file:
        file.write(cut)
    log.cut_back(10)
    log.log_metrics({"train/loss": 0.1}, 10)
    assert [row["step"] for row in lines(log)] == [5, 10]


def test_there_may_be_nothing_to_cut(tmp_path):
    log = log_of(tmp_path)
    log.cut_back(10)
    assert not log.path.exists()


def test_what_is_not_finite_stays_readable(tmp_path):
    log = log_of(tmp_path)
    log.log_metrics({"train/loss": math.nan}, 1)
    assert math.isnan(lines(log)[0]["train/loss"])


def test_counters_count_optimizer_steps():
    assert counters(25, 8, 10) == {"step": 25, "images_seen": 200, "epoch": 3}
