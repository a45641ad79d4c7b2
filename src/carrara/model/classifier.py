"""Training a classifier."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from carrara.classifier.cnn import CNN
from carrara.model.base import Model, OptimizerFactory
from carrara.network.labels import UNKNOWN


class ClassifierModel(Model):
    """Cross-entropy of a picture's label, which its caption is (`data.caption` says where the labels are).

    Args:
        classifier: what is trained.
        optimizer, warmup_steps, cooldown, max_steps, seed: see `Model`.
    """

    kind = "classifier"

    def __init__(
        self,
        classifier: CNN,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        cooldown: float,
        max_steps: int,
        seed: int,
    ):
        super().__init__(optimizer, warmup_steps, cooldown, max_steps, seed)
        self.classifier = classifier

    @property
    def hot(self) -> list[nn.Module]:
        return [self.classifier]

    def loss(self, batch: dict[str, Any], u: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.classifier(self.images(batch)).float()
        labels = self.classifier.labels(batch["captions"]).to(logits.device)
        known = (labels != UNKNOWN).sum().clamp_min(1)  # in validation there may be none
        return {"loss": F.cross_entropy(logits, labels, ignore_index=UNKNOWN, reduction="sum") / known}
