"""Scores every epoch, on all ranks, with averaged weights."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from carrara.callback.ema import EMA
from carrara.callback.log import Wandb
from carrara.callback.score import Score, Setting
from carrara.data.validation import ValidationSet
from carrara.model.base import Model


class Evaluation(Callback):
    """Every `every_steps` optimizer steps and after the last: all scores, logged once.

    Args:
        scores: what to compute.
        validation: on which samples.
        every_steps: optimizer steps in an epoch.
        ema: whose average is evaluated.
        samples_dir: for the pictures.
    """

    def __init__(
        self,
        scores: Sequence[Score],
        validation: ValidationSet,
        every_steps: int,
        ema: EMA,
        samples_dir: Path,
    ):
        self.scores = scores
        self.validation = validation
        self.every_steps = every_steps
        self.ema = ema
        self.samples_dir = samples_dir
        self.latest: dict[str, float] = {}
        self.step = 0
        self.seconds = 0.0  # spent here so far, so that others can leave it out

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if step == self.step or (step % self.every_steps and step != trainer.max_steps):
            return
        start = time.monotonic()
        self.step = step
        assert isinstance(pl_module, Model)
        self.latest = self.evaluate(trainer, pl_module)
        if trainer.is_global_zero:
            epoch = self._epoch(step)
            for logger in trainer.loggers:
                logger.log_metrics(self.latest, step)
                if isinstance(logger, Wandb):
                    logger.log_pictures(sorted(self.samples_dir.glob(f"*={epoch:04d}.png")), step)
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
            epoch=self._epoch(trainer.global_step),
        )
        model.eval()
        results: dict[str, float] = {}
        with self.ema.applied(model):
            for score in self.scores:
                results |= score(model, setting)
        model.train()
        return results

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "latest": self.latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.latest = state_dict["step"], state_dict["latest"]
