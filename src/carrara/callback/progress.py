"""Training's own numbers: loss, learning rate, gradient norm, images a second; on the screen and in the log."""

import logging
import math
import sys
import time
from collections import Counter
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from tqdm import tqdm

from carrara.callback.evaluation import Evaluation
from carrara.callback.guard import Guard
from carrara.callback.ranks import gather

_log = logging.getLogger(__name__)


class Progress(Callback):
    """Logs means since the last line every `every_steps` optimizer steps; shows a bar or, without a terminal, lines.

    Logged: `train/loss` and its parts, over all ranks and where they are finite, `train/learning_rate`,
    `train/gradient_norm`, `train/skipped_steps` once there are any, `images_per_second` (training alone, without
    evaluation), `data/skipped_…`.

    What is not yet on a line is in the checkpoints, so that a resumed run writes the lines of one that was never
    stopped.

    Args:
        every_steps: optimizer steps between two lines of the log.
        batch_size: global batch.
        evaluation: whose last scores are shown.
        headline: the score to show.
        guard: measures the gradient.
    """

    def __init__(self, every_steps: int, batch_size: int, evaluation: Evaluation, headline: str, guard: Guard):
        self.every_steps = every_steps
        self.batch_size = batch_size
        self.evaluation = evaluation
        self.headline = headline
        self.guard = guard
        self.bar: tqdm[None] | None = None
        self.start: float | None = None
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}  # of finite values, and how many those are: (2,) float32
        self.skipped: dict[str, int] = {}
        self.steps = 0
        self.seconds = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.step = trainer.global_step
        self.sums = {name: value.to(pl_module.device) for name, value in self.sums.items()}
        if trainer.is_global_zero and sys.stderr.isatty():
            total = trainer.max_steps * self.batch_size
            self.bar = tqdm(total=total, initial=self.step * self.batch_size, unit="img", dynamic_ncols=True)

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.start is None:  # not before: starting workers is done once
            self.start = time.monotonic() - self.evaluation.seconds

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        now = time.monotonic() - self.evaluation.seconds
        assert self.start is not None
        self.seconds, self.start = self.seconds + now - self.start, now  # with the wait for the next batch
        for name, value in outputs.items():
            value = value.detach().float()
            if name == "loss":  # Lightning hands it on divided
                value = value * trainer.accumulate_grad_batches
            finite = value.isfinite()
            counted = torch.stack([torch.where(finite, value, 0.0), finite.float()])
            self.sums[name] = self.sums[name] + counted if name in self.sums else counted
        for reason, count in batch["skipped"].items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            self.steps += 1
            if self.step % self.every_steps == 0 or self.step == trainer.max_steps:
                self._flush(trainer)

    def _flush(self, trainer: lightning.Trainer) -> None:
        names = list(self.sums)
        sums = trainer.strategy.reduce(torch.stack([self.sums[name] for name in names]), reduce_op="sum").tolist()
        values = {f"train/{name}": total / count for name, (total, count) in zip(names, sums, strict=True) if count}
        values["train/learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        norm = float(self.guard.norm)
        if math.isfinite(norm):
            values["train/gradient_norm"] = norm
        if self.guard.total:
            values["train/skipped_steps"] = float(self.guard.total)
        values["images_per_second"] = self.steps * self.batch_size / self.seconds
        skipped = sum((Counter(of_rank) for of_rank in gather(trainer, self.skipped)), Counter[str]())
        values |= {f"data/skipped_{reason}": float(count) for reason, count in sorted(skipped.items())}
        for logger in trainer.loggers:
            logger.log_metrics(values, self.step)
        if trainer.is_global_zero:
            self._show(trainer, values)
        self._reset()

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = {
            "sums": {name: value.cpu() for name, value in self.sums.items()},
            "skipped": self.skipped,
            "steps": self.steps,
            "seconds": self.seconds,
        }
        checkpoint["progress"] = gather(trainer, state)

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states = checkpoint["progress"]
        rank = trainer.global_rank
        if len(states) == trainer.world_size:
            self.sums, self.skipped = states[rank]["sums"], states[rank]["skipped"]
        else:  # rank 0 has all that the others had
            self.sums = {name: sum(state["sums"][name] for state in states) * (rank == 0) for name in states[0]["sums"]}
            self.skipped = dict(sum((Counter(state["skipped"]) for state in states), Counter())) if rank == 0 else {}
        self.steps, self.seconds = states[0]["steps"], states[0]["seconds"]

    def _show(self, trainer: lightning.Trainer, values: dict[str, float]) -> None:
        shown = {"loss": f"{values['train/loss']:.4f}"} if "train/loss" in values else {}
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
