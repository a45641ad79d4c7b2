"""A step whose loss or gradient is no finite number is left out, on all ranks alike."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from carrara.callback.ema import trainable
from carrara.callback.json_lines import append, cut_back
from carrara.callback.ranks import gather
from carrara.errors import UserError, going_on_without

_log = logging.getLogger(__name__)


class Guard(Callback):
    """Leaves out every step whose gradient is not finite; `max_skipped` of them in a row end the run.

    Such a step counts, and the stream goes on behind it; weights and optimizer stay as they are. A loss that is not
    finite has such a gradient (`Model.training_step` sees to it), and the gradient of one rank is in everyone's: all
    decide alike without a word.

    Args:
        path: of `skipped_steps.jsonl`, where rank 0 leaves a line for each: step, gradient norm, and for each rank the
            keys of the samples whose loss was not finite, or of all samples where every loss was.
        max_skipped: so many in a row end the run.

    Attributes:
        norm: of the gradient of the last step, before it is clipped.
        total: steps left out so far.
    """

    def __init__(self, path: Path, max_skipped: int):
        self.path = path
        self.max_skipped = max_skipped
        self.norm = torch.zeros(())
        self.total = 0
        self.in_a_row = 0
        self._step = 0
        self._micro_batches: list[tuple[list[str], Tensor]] = []  # keys and loss

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step
        if trainer.is_global_zero:
            cut_back(self.path, self._step)

    def on_before_optimizer_step(self, trainer: lightning.Trainer, pl_module: Any, optimizer: Any) -> None:
        grads = [p.grad for _, p in trainable(pl_module) if p.grad is not None]
        self.norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        if self.norm.isfinite():
            self.in_a_row = 0
        else:
            self.in_a_row += 1
            self.total += 1
            optimizer.zero_grad(set_to_none=True)  # parameters without a gradient are passed over

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._micro_batches.append((batch["keys"], outputs["loss"].detach()))
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        self._step = trainer.global_step
        if self.in_a_row:
            self._report(trainer)
        self._micro_batches = []

    def _report(self, trainer: lightning.Trainer) -> None:
        keys = gather(trainer, _suspects(self._micro_batches))
        if trainer.is_global_zero:
            norm = str(float(self.norm))
            line = {"step": self._step, "gradient_norm": norm, "keys": keys}
            with going_on_without(self.path):
                append(self.path, [json.dumps(line)])
            first = next((key for of_rank in keys for key in of_rank), "")
            _log.warning("step %d is left out: its gradient is %s (%s, … in %s)", self._step, norm, first, self.path)
        if self.in_a_row >= self.max_skipped:
            raise UserError(
                f"{self.in_a_row} steps in a row, up to step {self._step}, had a loss or gradient that is not finite; "
                f"{self.path} names the samples. Start again with a lower trainer.learning_rate, or look at them"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total, self.in_a_row = state_dict["total"], state_dict["in_a_row"]


def _suspects(micro_batches: Sequence[tuple[list[str], Tensor]]) -> list[str]:
    """Keys of the micro-batches whose loss is not finite, else of all."""
    bad = [keys for keys, loss in micro_batches if not math.isfinite(float(loss))]
    return [key for keys in bad or [keys for keys, _ in micro_batches] for key in keys]
