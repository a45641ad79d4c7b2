"""Lines for which there is no room: a training goes on, and writes them when there is."""

import builtins
import errno
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from carrara.callback.log import JsonLines
from carrara.callback.reconstruction import Reconstruction
from carrara.callback.restoration import Restoration
from carrara.callback.score import Setting
from carrara.errors import going_on_without
from carrara.pipeline.pictures import save_grid
from tests.tiny import autoencoder_model, restoration_model, setting


class Full(io.StringIO):
    """What a file does where some room is left: it takes a part, and fails."""

    def __init__(self, path: Path, code: int):
        super().__init__()
        self.path, self.code = path, code

    def writelines(self, lines: Any) -> None:
        whole = "".join(lines)
        with builtins.open(self.path, "a") as file:
            file.write(whole[: len(whole) // 2])
        raise OSError(self.code, "No space left on device")


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_lines_are_kept_until_there_is_room(tmp_path, monkeypatch, caplog, code):
    log = JsonLines(tmp_path / "metrics.jsonl", 4, 10)
    log.log_metrics({"train/loss": 1.0}, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *args, **kwargs: Full(self, code))
        with caplog.at_level(logging.ERROR, logger="carrara"):
            log.log_metrics({"train/loss": 2.0}, 2)
            log.log_metrics({"train/loss": 3.0}, 3)
    assert steps(log.path) == [1]
    log.log_metrics({"train/loss": 4.0}, 4)
    assert steps(log.path) == [1, 2, 3, 4]


def test_another_failure_is_one(tmp_path, monkeypatch):
    log = JsonLines(tmp_path / "metrics.jsonl", 4, 10)
    monkeypatch.setattr(Path, "open", lambda self, *args, **kwargs: Full(self, errno.EIO))
    with pytest.raises(OSError, match="No space"):
        log.log_metrics({"train/loss": 1.0}, 1)


def test_a_preview_is_left_out_where_there_is_no_room(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("carrara"), "propagate", True)
    full = Path("/dev/full")
    with caplog.at_level(logging.ERROR), going_on_without(full), full.open("w") as file:
        file.write("x" * 100_000)
    assert "/dev/full is not written: the disk is full (No space left on device)" in caplog.text
    with pytest.raises(FileNotFoundError), going_on_without(full):
        save_grid(Path("/proc/none/x.png"), torch.zeros(1, 3, 2, 2, dtype=torch.uint8), 1, [])


SCORES: dict[str, Callable[[Setting], dict[str, float]]] = {
    "comparison": lambda where: Restoration(4, 4, 2)(restoration_model().eval(), where),
    "reconstruction": lambda where: Reconstruction(4, 4, 2, None)(autoencoder_model().eval(), where),
}


@pytest.mark.parametrize("module", SCORES)
def test_scores_are_there_without_previews(tmp_path, monkeypatch, module):
    def save_grid(path: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(f"carrara.callback.{module}.save_grid", save_grid)
    with torch.no_grad():
        assert SCORES[module](setting(16, samples_dir=tmp_path))["val/psnr"] > 0
