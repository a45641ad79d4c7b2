"""Training's own numbers: loss, learning rate, gradient norm, images a second; on the screen and in the log."""

import logging
import math
import sys
import time
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from tqdm import tqdm

from carrara.callback.ema import trainable
from carrara.callback.evaluation import Evaluation
from carrara.errors import UserError

_log = logging.getLogger(__name__)


class Progress(Callback):
    """Logs means since the last line every `every_steps` optimizer steps; shows a bar or, without a terminal, lines.

    Logged: `train/loss` and its parts, `train/learning_rate`, `train/gradient_norm`, `images_per_second` (training
    alone, without evaluation), `data/skipped_…`.

    Args:
        every_steps: optimizer steps between two lines of the log.
        batch_size: global batch.
        evaluation: whose last scores are shown.
        headline: the score to show.
    """

    def __init__(self, every_steps: int, batch_size: int, evaluation: Evaluation, headline: str):
        self.every_steps = every_steps
        self.batch_size = batch_size
        self.evaluation = evaluation
        self.headline = headline
        self.bar: tqdm[None] | None = None
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.batches = 0
        self.steps = 0
        self.seconds = 0.0
        self.norm: Tensor | None = None
        self.skipped: dict[str, int] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.step = trainer.global_step
        if trainer.is_global_zero and sys.stderr.isatty():
            total = trainer.max_steps * self.batch_size
            self.bar = tqdm(total=total, initial=self.step * self.batch_size, unit="img", dynamic_ncols=True)

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.start = time.monotonic() - self.evaluation.seconds

    def on_before_optimizer_step(self, trainer: lightning.Trainer, pl_module: Any, optimizer: Any) -> None:
        grads = [p.grad for _, p in trainable(pl_module) if p.grad is not None]
        self.norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.seconds += time.monotonic() - self.evaluation.seconds - self.start
        for name, value in outputs.items():
            value = value.detach().float()
            if name == "loss":  # Lightning hands it on divided
                value = value * trainer.accumulate_grad_batches
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        for reason, count in batch["skipped"].items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
        self.batches += 1
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            self.steps += 1
            if self.steps == self.every_steps or self.step == trainer.max_steps:
                self._flush(trainer)

    def _flush(self, trainer: lightning.Trainer) -> None:
        names = list(self.sums)
        means = trainer.strategy.reduce(
            torch.stack([self.sums[name] for name in names]) / self.batches, reduce_op="mean"
        )
        values = {f"train/{name}": float(value) for name, value in zip(names, means.tolist(), strict=True)}
        values["train/learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        if self.norm is not None:
            values["train/gradient_norm"] = float(self.norm)
        values["images_per_second"] = self.steps * self.batch_size / self.seconds
        values |= {f"data/skipped_{reason}": float(count) for reason, count in self.skipped.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, self.step)
        if not math.isfinite(values["train/loss"]):  # on all ranks: the mean is theirs
            raise UserError(
                f"the loss is {values['train/loss']} at step {self.step}: lower trainer.learning_rate, or go on from "
                "an earlier checkpoint with resume="
            )
        if trainer.is_global_zero:
            self._show(trainer, values)
        self._reset()

    def _show(self, trainer: lightning.Trainer, values: dict[str, float]) -> None:
        shown = {"loss": f"{values['train/loss']:.4f}"}
        if self.headline in self.evaluation.latest:
            shown[self.headline] = f"{self.evaluation.latest[self.headline]:.3f}"
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(self.step * self.batch_size - self.bar.n)
            return
        left = (trainer.max_steps - self.step) * self.batch_size / values["images_per_second"]
        text = ", ".join(f"{name} {value}" for name, value in shown.items())
        rate = f"{values['images_per_second']:.0f} images/s"
        _log.info("step %d of %d: %s, %s, about %.1f min left", self.step, trainer.max_steps, text, rate, left / 60)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.bar is not None:
            self.bar.close()
