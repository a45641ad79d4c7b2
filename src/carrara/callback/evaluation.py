"""Scores every epoch, on all ranks, with averaged weights."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from carrara.callback.ema import EMA
from carrara.callback.log import JsonLines, Wandb
from carrara.callback.score import Score, Setting
from carrara.data.validation import ValidationSet
from carrara.model.base import Model


class Evaluation(Callback):
    """Every `every_steps` optimizer steps and after the last: all scores, logged once.

    A run that was stopped in an evaluation has none in its log at the step it goes on from, and begins with it.

    Args:
        scores: what to compute.
        validation: on which samples.
        every_steps: optimizer steps in an epoch.
        ema: whose average is evaluated.
        samples_dir: for the pictures.
        log: the run's, which tells what has been evaluated.

    Attributes:
        latest: the last scores.
        seconds: spent here so far, so that others can leave it out.
    """

    def __init__(
        self,
        scores: Sequence[Score],
        validation: ValidationSet,
        every_steps: int,
        ema: EMA,
        samples_dir: Path,
        log: JsonLines,
    ):
        self.scores = scores
        self.validation = validation
        self.every_steps = every_steps
        self.ema = ema
        self.samples_dir = samples_dir
        self.history = log
        self.latest: dict[str, float] = {}
        self.step = 0
        self.seconds = 0.0

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.step = self.ema.step  # the trainer does not know its own step yet
        known = trainer.strategy.broadcast(self.history.scores())
        done = [step for step in known if step <= self.step]
        if done:
            self.latest = known[max(done)]
        if self.step and self.step not in known and self._due(trainer, self.step):
            self._run(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if step == self.step:
            return
        self.step = step
        if self._due(trainer, step):
            self._run(trainer, pl_module)

    def _due(self, trainer: lightning.Trainer, step: int) -> bool:
        return step % self.every_steps == 0 or step == trainer.max_steps

    def _run(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        start = time.monotonic()
        assert isinstance(pl_module, Model)
        self.latest = self.evaluate(trainer, pl_module)
        if trainer.is_global_zero:
            epoch = self._epoch(self.step)
            for logger in trainer.loggers:
                logger.log_metrics(self.latest, self.step)
                if isinstance(logger, Wandb):
                    logger.log_pictures(sorted(self.samples_dir.glob(f"*={epoch:04d}.png")), self.step)
        self.seconds += time.monotonic() - start

    def _epoch(self, step: int) -> int:
        return -(-step // self.every_steps)

    @torch.no_grad()
    def evaluate(self, trainer: lightning.Trainer, model: Model) -> dict[str, float]:
        """All scores with averaged weights; the module comes back as it was."""
        setting = Setting(
            validation=self.validation,
            rank=trainer.global_rank,
            world=trainer.world_size,
            device=model.device,
            autocast=trainer.precision_plugin.forward_context,
            samples_dir=self.samples_dir if trainer.is_global_zero else None,
            epoch=self._epoch(self.step),
        )
        model.eval()
        results: dict[str, float] = {}
        devices = [model.device] if model.device.type == "cuda" else []
        with self.ema.applied(model), torch.random.fork_rng(devices):  # training goes on as if there had been none
            for score in self.scores:
                results |= score(model, setting)
        model.train()
        return results
