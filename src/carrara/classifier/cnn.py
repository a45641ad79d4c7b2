"""A convolutional network that tells labels; without its last layer it is a feature extractor."""

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from carrara.errors import UserError
from carrara.network.layers import norm_groups
from carrara.network.vocabulary import Vocabulary

UNKNOWN = -1


class Labels(Vocabulary):
    """The different captions, in alphabetical order, as classes.

    Args:
        num_classes: the most there may be.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self._numbers: dict[str, int] | None = None

    @property
    def trained(self) -> bool:
        return self._numbers is not None

    def train_on(self, captions: Iterable[str]) -> None:
        """Collects the labels.

        Raises:
            UserError: there are more than `num_classes`.
        """
        found: set[str] = set()
        for caption in captions:
            found.add(caption)
            if len(found) > self.num_classes:
                raise UserError(
                    f"the captions are more than {self.num_classes} different ones, such as {caption[:60]!r}: name "
                    "labels with data.caption (a member's suffix, as .cls, or a key of the JSON), or raise "
                    "classifier.num_classes"
                )
        self._numbers = {label: number for number, label in enumerate(sorted(found))}

    def forward(self, captions: Sequence[str]) -> Tensor:
        """B captions -> their classes (B,) int64; UNKNOWN for one that was not in training."""
        if self._numbers is None:
            raise RuntimeError("the labels are not known: call train_on(captions) or load a state dict")
        return torch.tensor([self._numbers.get(caption, UNKNOWN) for caption in captions])

    def to_text(self) -> str:
        assert self._numbers is not None
        return json.dumps(list(self._numbers))

    def from_text(self, text: str) -> None:
        self._numbers = {label: number for number, label in enumerate(json.loads(text))}


class CNN(nn.Module):
    """Levels of one convolution each, all but the first halving the picture, and a linear layer on their mean.

    Args:
        channels: of the levels.
        num_classes: the most different labels.
    """

    not_hidden = ("stem", "head")

    def __init__(self, channels: Sequence[int], num_classes: int):
        super().__init__()
        self.labels = Labels(num_classes)
        self.feature_dim = channels[-1]
        self.stem = nn.Conv2d(3, channels[0], 3, padding=1)
        levels = [
            nn.Sequential(
                nn.GroupNorm(norm_groups(before), before),
                nn.SiLU(),
                nn.Conv2d(before, after, 3, stride=2, padding=1),
            )
            for before, after in pairwise(channels)
        ]
        self.levels = nn.Sequential(*levels, nn.GroupNorm(norm_groups(channels[-1]), channels[-1]), nn.SiLU())
        self.head = nn.Linear(channels[-1], num_classes)

    def features(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [−1, 1] -> (B, feature_dim)."""
        return self.levels(self.stem(images)).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [−1, 1] -> class logits (B, num_classes)."""
        return self.head(self.features(images))
