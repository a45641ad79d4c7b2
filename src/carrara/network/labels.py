"""Captions as class labels."""

import json
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.network.vocabulary import Vocabulary

UNKNOWN = -1


class Labels(Vocabulary):
    """The different captions, in alphabetical order, as classes; the empty caption is none.

    Args:
        num_classes: the most there may be.
    """

    complete = True

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self._numbers: dict[str, int] | None = None

    @property
    def trained(self) -> bool:
        return self._numbers is not None

    @property
    def names(self) -> list[str]:
        """The labels in the order of their classes; none before training."""
        return list(self._numbers or ())

    def train_on(self, captions: Iterable[str]) -> None:
        """Collects the labels.

        Raises:
            UserError: there are more than `num_classes`.
        """
        found: set[str] = set()
        for caption in captions:
            if caption:
                found.add(caption)
            if len(found) > self.num_classes:
                raise UserError(
                    f"the captions are more than {self.num_classes} different ones, such as {caption[:60]!r}: name "
                    "labels with data.caption (a member's suffix, as .cls, or a key of the JSON), or raise num_classes"
                )
        self._numbers = {label: number for number, label in enumerate(sorted(found))}

    def forward(self, captions: Sequence[str]) -> Tensor:
        """B captions -> their classes (B,) int64; UNKNOWN for one that was not in training."""
        if self._numbers is None:
            raise RuntimeError("the labels are not known: call train_on(captions) or load a state dict")
        return torch.tensor([self._numbers.get(caption, UNKNOWN) for caption in captions])

    def to_text(self) -> str:
        return json.dumps(self.names)

    def from_text(self, text: str) -> None:
        self._numbers = {label: number for number, label in enumerate(json.loads(text))}
