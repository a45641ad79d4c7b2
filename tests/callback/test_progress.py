import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from carrara.callback import evaluation as evaluation_module
from carrara.callback import progress as progress_module
from carrara.callback.ema import EMA
from carrara.callback.evaluation import Evaluation
from carrara.callback.guard import Guard
from carrara.callback.log import JsonLines
from carrara.callback.progress import Progress
from carrara.model.diffusion import DiffusionModel
from tests.tiny import Stream, Validation, autoencoder_model, batches, diffusion_model, trainer


def logged(tmp_path, model, every: int, steps: int, stream=None, scores=(), epoch=10**6, **changes) -> list[dict]:
    log = JsonLines(tmp_path / "metrics.jsonl", batch_size=4, steps_per_epoch=10)
    ema = EMA(0.9)
    evaluation = Evaluation(scores, Validation(4), epoch, ema, tmp_path, log)  # type: ignore[arg-type]
    guard = Guard(tmp_path / "skipped_steps.jsonl", 3)
    progress = Progress(every, 4, evaluation, "val/loss", guard)
    callbacks = [ema, guard, progress, *([evaluation] if scores else [])]
    run = trainer(tmp_path, *callbacks, max_steps=steps, logger=[log], **changes)
    run.fit(model, stream or batches(steps * changes.get("accumulate_grad_batches", 1)))
    return [json.loads(line) for line in log.path.read_text().splitlines()]


def recording(model: DiffusionModel) -> list[float]:
    """The loss of every micro-batch that `model` will be trained on."""
    losses: list[float] = []
    step = model.training_step

    def record(batch, batch_idx):
        outputs = step(batch, batch_idx)
        losses.append(outputs["loss"].item())
        return outputs

    model.training_step = record  # type: ignore[method-assign]
    return losses


def test_lines_hold_means_since_the_last_line(tmp_path):
    model = diffusion_model()
    losses = recording(model)
    rows = logged(tmp_path, model, 2, 5)
    assert [row["step"] for row in rows] == [2, 4, 5]
    wanted = [sum(losses[0:2]) / 2, sum(losses[2:4]) / 2, losses[4]]
    assert [row["train/loss"] for row in rows] == pytest.approx(wanted, rel=1e-5)


def test_micro_batches_are_averaged_and_steps_counted(tmp_path):
    model = diffusion_model()
    losses = recording(model)
    rows = logged(tmp_path, model, 1, 2, accumulate_grad_batches=3)
    assert [(row["step"], row["images_seen"]) for row in rows] == [(1, 4), (2, 8)]
    wanted = [sum(losses[:3]) / 3, sum(losses[3:]) / 3]
    assert [row["train/loss"] for row in rows] == pytest.approx(wanted, rel=1e-5)


def test_every_part_of_the_loss_and_the_run_is_told(tmp_path):
    rows = logged(tmp_path, autoencoder_model(), 1, 2, gradient_clip_val=1e-3)
    for row in rows:
        assert {"train/loss", "train/reconstruction", "train/kl", "train/learning_rate"} <= row.keys()
        assert row["train/gradient_norm"] > 1e-3  # before it is clipped
        assert row["images_per_second"] > 0 and math.isfinite(row["train/loss"])


def ticking(now: list[float]) -> DiffusionModel:
    """A model whose micro-batch takes 1 s of the clock."""
    model = diffusion_model()
    step = model.training_step

    def tick(batch, batch_idx):
        now[0] += 1
        return step(batch, batch_idx)

    model.training_step = tick  # type: ignore[method-assign]
    return model


def test_the_rate_is_that_of_training_alone(tmp_path, monkeypatch):
    """By a clock on which a micro-batch takes 1 s and an evaluation 1000 s."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], time=lambda: 0.0)
    monkeypatch.setattr(progress_module, "time", clock)
    monkeypatch.setattr(evaluation_module, "time", clock)
    model = ticking(now)

    def score(model, setting):
        now[0] += 1000
        return {"val/loss": 1.0}

    rows = logged(tmp_path, model, 2, 6, scores=[score], epoch=2)
    rates = [row["images_per_second"] for row in rows if "images_per_second" in row]
    assert rates == pytest.approx([4, 4, 4])
    assert sum("val/loss" in row for row in rows) == 3


def test_waiting_for_data_counts(tmp_path, monkeypatch):
    """By a clock on which a batch is waited for 3 s and trained on for 1 s; the wait for the very first is start-up."""
    now = [0.0]
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: 0.0))
    model = ticking(now)
    rows = iter(batches(6).rows)

    class Slow(Stream):
        def __iter__(self):
            for row in rows:
                now[0] += 3
                yield row

    logged_rows = logged(tmp_path, model, 2, 6, Slow(batches(6).rows))
    rates = [row["images_per_second"] for row in logged_rows if "images_per_second" in row]
    assert rates[1:] == pytest.approx([1, 1]) and 1 <= rates[0] < 2


def test_skipped_samples_are_counted_by_reason(tmp_path):
    stream = batches(4)
    stream.rows[0]["skipped"] = {"truncated": 2}
    stream.rows[1]["skipped"] = {"truncated": 1, "too_large": 1}
    rows = logged(tmp_path, diffusion_model(), 2, 4, stream)
    assert (rows[0]["data/skipped_truncated"], rows[0]["data/skipped_too_large"]) == (3, 1)
    assert not any(key.startswith("data/") for key in rows[1])


def test_a_loss_that_is_not_finite_is_in_no_mean(tmp_path):
    model = diffusion_model()
    step, seen = model.loss, []

    def loss(batch, u=None):
        losses = step(batch, u)
        seen.append(losses["loss"].item())
        return losses | {"loss": losses["loss"] * torch.nan} if len(seen) == 2 else losses

    model.loss = loss  # type: ignore[method-assign]
    (row,) = logged(tmp_path, model, 3, 3)
    assert row["train/loss"] == pytest.approx((seen[0] + seen[2]) / 2, rel=1e-5)
    assert row["train/skipped_steps"] == 1


class Kill(Callback):
    """Ends the run after a step, of which there is a checkpoint."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


@pytest.mark.parametrize("killed_at", [2, 3, 4])
def test_a_resumed_run_writes_the_lines_of_one_that_was_never_stopped(tmp_path, killed_at):
    def train(folder: Path, *others: Callback, start: int = 0, resume: Path | None = None) -> list[dict[str, float]]:
        folder.mkdir(exist_ok=True)
        log = JsonLines(folder / "metrics.jsonl", batch_size=4, steps_per_epoch=10)
        ema, guard = EMA(0.9), Guard(folder / "skipped_steps.jsonl", 3)
        evaluation = Evaluation([], Validation(4), 100, ema, folder, log)  # type: ignore[arg-type]
        progress = Progress(3, 4, evaluation, "val/loss", guard)
        run = trainer(folder, ema, guard, progress, *others, max_steps=6, logger=[log])
        stream = batches(6, start)
        for row in stream.rows:
            row["skipped"] = {"truncated": 1}
        run.fit(diffusion_model(), stream, ckpt_path=resume, weights_only=True)
        rows = [json.loads(line) for line in log.path.read_text().splitlines()]
        return [{key: row[key] for key in row if key not in ("time", "images_per_second")} for row in rows]

    torch.manual_seed(0)
    whole = train(tmp_path / "whole")
    assert [row["step"] for row in whole] == [3, 6] and whole[0]["data/skipped_truncated"] == 3
    torch.manual_seed(0)
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(InterruptedError):
        train(tmp_path / "again", Kill(checkpoint, killed_at))
    assert train(tmp_path / "again", start=killed_at, resume=checkpoint) == whole  # to the bit


def test_without_a_terminal_there_are_lines(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        logged(tmp_path, diffusion_model(), 2, 4)
    assert "step 4 of 4: loss" in caplog.text and "images/s" in caplog.text
