"""From a noise vector and a caption to a picture, or its latents, in one call."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.network.conditioning import Conditioning
from carrara.network.layers import zero_
from carrara.network.pyramid import Pyramid


class Generator(nn.Module):
    """noise (B, noise_width), conditioning -> pictures or latents (B, C, R, R).

    Noise and pooled vector make the coarsest level, which attention and blocks refine; no style enters further up.

    Args:
        pyramid: its levels.
        noise_width: values of the noise.
        pooled_width: features of the conditioning's pooled vector.
    """

    def __init__(self, pyramid: Pyramid, noise_width: int, pooled_width: int):
        super().__init__()
        self.noise_shape = (noise_width,)
        self.grid, self.patch = pyramid.grid, pyramid.patch
        channels = pyramid.channels
        self.start = nn.Linear(noise_width + pooled_width, pyramid.features)
        self.levels = nn.ModuleList(reversed(pyramid.levels()))
        self.narrow = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairwise(reversed(channels)))
        self.conv_out = zero_(nn.Conv2d(channels[0], pyramid.in_channels * pyramid.patch**2, 3, padding=1))

    def forward(self, noise: Tensor, conditioning: Conditioning) -> Tensor:
        x = self.start(torch.cat([noise, conditioning.pooled.to(noise.dtype)], dim=1))
        x = self.levels[0](x.unflatten(1, (-1, self.grid, self.grid)), conditioning)
        for narrow, level in zip(self.narrow, self.levels[1:], strict=True):
            x = level(F.interpolate(narrow(x), scale_factor=2.0, mode="bilinear"), conditioning)
        return F.pixel_shuffle(self.conv_out(x), self.patch)
