"""A convolutional network that tells labels; without its last layer it is a feature extractor."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from carrara.network.labels import Labels
from carrara.network.layers import norm_groups


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
