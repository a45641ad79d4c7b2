"""Class labels instead of sentences."""

import torch
from torch import nn

from carrara.conditioner.base import Conditioner
from carrara.errors import UserError
from carrara.network.conditioning import Conditioning
from carrara.network.labels import UNKNOWN, Labels

_SHOWN = 5  # known labels in a message


class ClassLabels(Conditioner):
    """One learned vector a label, as in class-conditional diffusion (Dhariwal & Nichol 2021), and one for no label.

    The labels are the different captions of training (`data.caption` says where they are); the empty caption is the
    unconditional case.

    Args:
        num_classes: the most labels.
        width: see `Conditioner`.
    """

    def __init__(self, num_classes: int, width: int):
        super().__init__(width)
        self.labels = Labels(num_classes)
        self.embedding = nn.Embedding(1 + num_classes, width)  # the first row is that of no label
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, captions: list[str]) -> Conditioning:
        """B labels -> one token each (B, 1, D); the pooled vector (B, D) is the same.

        Raises:
            UserError: a label that was not in training.
        """
        numbers = self.labels(captions)
        for caption, number in zip(captions, numbers.tolist(), strict=True):
            if number == UNKNOWN and caption:
                names = self.labels.names
                listed = ", ".join(map(repr, names[:_SHOWN])) + (", …" if len(names) > _SHOWN else "")
                raise UserError(f"the label {caption[:60]!r} was not in training; there are {len(names)}: {listed}")
        rows = torch.where(numbers == UNKNOWN, 0, 1 + numbers)
        pooled = self.embedding(rows.to(self.embedding.weight.device))
        mask = torch.ones(len(captions), 1, dtype=torch.bool, device=pooled.device)
        return Conditioning(pooled[:, None], mask, pooled)
