import json
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

from carrara.callback.json_lines import cut_back
from carrara.callback.log import JsonLines, Wandb, counters
from carrara.errors import UserError


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
    cut_back(log.path, 10)
    assert [row["step"] for row in lines(log)] == [5, 10, 10]
    log.log_metrics({"train/loss": 0.1}, 15)
    assert [row["step"] for row in lines(log)] == [5, 10, 10, 15]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", ['{"step": 7, "images_seen": 22', "{", '{"images_seen": 3}\n', "\x00\x00\x00"])
def test_a_line_cut_by_a_kill_is_forgotten(tmp_path, cut):
    log = log_of(tmp_path, 5)
    with log.path.open("a") as file:
        file.write(cut)
    cut_back(log.path, 10)
    log.log_metrics({"train/loss": 0.1}, 10)
    assert [row["step"] for row in lines(log)] == [5, 10]


def test_there_may_be_nothing_to_cut(tmp_path):
    log = log_of(tmp_path)
    cut_back(log.path, 10)
    assert not log.path.exists()


def test_what_is_not_finite_stays_readable(tmp_path):
    log = log_of(tmp_path)
    log.log_metrics({"train/loss": math.nan}, 1)
    assert math.isnan(lines(log)[0]["train/loss"])


def test_counters_count_optimizer_steps():
    assert counters(25, 8, 10) == {"step": 25, "images_seen": 200, "epoch": 3}


def test_traps_21_and_22_without_a_key_wandb_is_kept_here_and_all_stands_over_images_seen(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    settings: dict[str, Any] = {"mode": "auto", "project": "carrara", "entity": None, "tags": []}
    caplog.set_level("INFO", "carrara")
    log = Wandb(tmp_path, {"logger": {"wandb": settings}, "sweep": None}, 32, 10)
    log.log_metrics({"train/loss": 0.5}, 3)
    log.experiment.finish()
    wandb.teardown()  # waits until all is on disk
    assert "W&B: offline, for want of a key (wandb login); later: " in caplog.text
    caplog.clear()
    Wandb(tmp_path, {"logger": {"wandb": settings | {"mode": "offline"}}, "sweep": None}, 32, 10)
    assert "W&B: offline; later: " in caplog.text
    with pytest.raises(UserError, match=r"logger\.wandb\.mode=onlin is not known; it is one of auto, online"):
        Wandb(tmp_path, {"logger": {"wandb": settings | {"mode": "onlin"}}, "sweep": None}, 32, 10)
    (path,) = tmp_path.rglob("run-*.wandb")
    records = list(written(path))
    metrics = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    assert {(one.name or one.glob_name, one.step_metric) for one in metrics} >= {
        ("images_seen", ""),
        ("*", "images_seen"),
    }
    (row,) = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    found = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item}
    assert (found["train/loss"], found["images_seen"], found["step"], found["epoch"]) == (0.5, 96, 3, 1)


WANDB: dict[str, Any] = {"mode": "auto", "project": "carrara", "entity": None, "tags": []}


def mirror(folder: Path, **changes: str) -> Wandb:
    folder.mkdir(exist_ok=True)
    return Wandb(folder, {"logger": {"wandb": WANDB | changes}, "sweep": None}, 32, 10)


def test_a_key_without_a_network_is_kept_here_too(tmp_path, monkeypatch, caplog):
    """As on most compute nodes; the mirror must not end the run."""
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def login(**settings: object) -> bool:
        raise wandb.errors.AuthenticationError("the server cannot be reached")

    monkeypatch.setattr(wandb, "login", login)
    caplog.set_level("INFO", "carrara")
    mirror(tmp_path / "a")
    assert "W&B: offline, for an error of its server (the server cannot be reached); later: wandb sync" in caplog.text
    with pytest.raises(UserError, match=r"logger\.wandb\.mode=online cannot be, for an error of its server"):
        mirror(tmp_path / "b", mode="online")


def test_runs_of_one_process_are_runs_of_their_own(tmp_path, monkeypatch, caplog):
    """Under torchrun a run's parts are trained in the same process, one by one."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", lambda **settings: False)
    for name in ("part", "run"):
        one = mirror(tmp_path / name)
        one.log_metrics({"train/loss": 0.5}, 3)
        assert one.experiment.id == (tmp_path / name / "wandb_id.txt").read_text()
        one.finish()
        assert "WANDB_MODE" not in os.environ
    wandb.teardown()
    assert all(len(list((tmp_path / name).rglob("run-*.wandb"))) == 1 for name in ("part", "run"))


def written(path: Path) -> Iterator[Record]:
    """W&B's file: a head of 7 bytes, then LevelDB's log: blocks of 32 kB, of pieces (crc, length, kind) of records."""
    data, record = path.read_bytes(), b""
    place = 7
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:  # too little left in a block for a piece's head
            place += 2**15 - place % 2**15
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(record)
            record = b""
