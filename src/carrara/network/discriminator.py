"""From a picture, or its latents, and a caption to one logit."""

import math

from torch import Tensor, nn

from carrara.network.conditioning import Conditioning
from carrara.network.layers import without_autocast
from carrara.network.pyramid import Pyramid, Tower


class Discriminator(nn.Module):
    """Pictures or latents (B, C, R, R), conditioning -> logits (B,), high for real ones of their captions.

    The caption is read by the levels' attention, and its pooled vector projects the features (Miyato & Koyama 2018,
    "cGANs with projection discriminator", eq. 4).

    Args:
        pyramid: its levels.
        pooled_width: features of the conditioning's pooled vector.
    """

    def __init__(self, pyramid: Pyramid, pooled_width: int):
        super().__init__()
        self.tower = Tower(pyramid)
        self.out = nn.Linear(pyramid.features, 1)
        self.project = nn.Linear(pooled_width, pyramid.features)

    def forward(self, images: Tensor, conditioning: Conditioning) -> Tensor:
        features = self.tower(images, conditioning)
        with without_autocast(features):  # it is small differences of logits that both players learn from
            features, pooled = (x.to(self.out.weight.dtype) for x in (features, conditioning.pooled))
            matching = (features * self.project(pooled)).sum(1) / math.sqrt(features.shape[1])
            return self.out(features).squeeze(1) + matching
