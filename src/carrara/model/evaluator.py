"""Training the evaluator."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from carrara.evaluator.clip import CLIP, info_nce
from carrara.model.base import Model, OptimizerFactory


class EvaluatorModel(Model):
    """Symmetric InfoNCE over the whole global micro-batch of all ranks; the temperature is kept at 0.01 or more.

    Radford et al. 2021, section 2.5.

    Args:
        evaluator: what is trained.
        optimizer, warmup_steps, cooldown, max_steps, seed: see `Model`.
    """

    kind = "evaluator"

    def __init__(
        self,
        evaluator: CLIP,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        cooldown: float,
        max_steps: int,
        seed: int,
    ):
        super().__init__(optimizer, warmup_steps, cooldown, max_steps, seed)
        self.evaluator = evaluator

    @property
    def hot(self) -> list[nn.Module]:
        return [self.evaluator.image_tower, self.evaluator.text_tower]

    @torch.no_grad()
    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Cut where it is kept, as a clamp within the loss would hold it there: it has no slope beyond."""
        self.evaluator.log_temperature.clamp_(min=math.log(0.01))

    def loss(self, batch: dict[str, Any], u: Tensor | None = None) -> dict[str, Tensor]:
        image = self.evaluator.embed_images(self.images(batch)).float()
        text = self.evaluator.embed_texts(batch["captions"]).float()
        if self._trainer is not None and self.trainer.world_size > 1 and self.training:
            image, text = (self._gathered(x) for x in (image, text))
        loss = info_nce(image, text, self.evaluator.log_temperature)
        return {"loss": loss}

    def _gathered(self, x: Tensor) -> Tensor:
        """(world · B, D): every rank's rows, with gradients, so that each rank's loss is the global batch's."""
        gathered = self.all_gather(x, sync_grads=True)
        assert isinstance(gathered, Tensor)
        return gathered.flatten(0, 1)
