"""Exponential moving average of the trainable weights: what is evaluated and exported."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class EMA(Callback):
    """Float32 average of the trainable weights, updated after every optimizer step.

    At step n the decay is min(decay, (1 + n) / (10 + n)), so that the first, random weights are soon forgotten.

    Args:
        decay: of the average once warmed up; 0 follows the weights.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.step = 0
        self.average: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        current = {name: p.detach().float() for name, p in trainable(pl_module)}
        if self.average:
            self.average = {name: self.average[name].to(p.device) for name, p in current.items()}
        else:
            self.average = {name: p.clone() for name, p in current.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self.step:  # gradients are still being accumulated
            return
        self.step = trainer.global_step
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        current = [p.detach().float() for _, p in trainable(pl_module)]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)

    @contextmanager
    def applied(self, module: lightning.LightningModule) -> Iterator[None]:
        """The module with averaged weights; its own come back, bit for bit, afterwards."""
        own = {name: p.detach().clone() for name, p in trainable(module)}
        self._write(module, self.average)
        try:
            yield
        finally:
            self._write(module, own)

    @torch.no_grad()
    def _write(self, module: lightning.LightningModule, values: dict[str, Tensor]) -> None:
        for name, p in trainable(module):
            p.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.average = state_dict["step"], state_dict["average"]


def trainable(module: lightning.LightningModule) -> list[tuple[str, torch.nn.Parameter]]:
    """Names and parameters of what is trained."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]
