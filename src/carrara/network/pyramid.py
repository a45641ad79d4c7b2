"""Levels of residual blocks between pictures or latents and a grid of a few cells, without batch norm."""

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from carrara.network.conditioning import Conditioning
from carrara.network.layers import zero_
from carrara.network.unet import SpatialTransformer

SLOPE = 0.2  # of the leaky ReLU for negative inputs


class Bottleneck(nn.Module):
    """1×1 convolution to twice the width, grouped 3×3 convolution, 1×1 back, around a skip; no norm.

    Huang et al. 2024, "The GAN is dead; long live the GAN!", section 4.2 (Config E). The last layer starts at zero
    (Zhang et al. 2019, "Fixup initialization"), so that the variance does not grow with the depth.
    """

    def __init__(self, channels: int, group_width: int):
        super().__init__()
        hidden = 2 * channels
        self.expand = nn.Conv2d(channels, hidden, 1)
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden // group_width)
        self.reduce = zero_(nn.Conv2d(hidden, channels, 1))
        for conv in (self.expand, self.mix):
            nn.init.kaiming_normal_(conv.weight, a=SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.mix(F.leaky_relu(self.expand(x), SLOPE)), SLOPE)
        return x + self.reduce(h)


class Level(nn.Module):
    """Residual blocks at one resolution and, where it has attention, a spatial transformer that reads the caption."""

    def __init__(self, blocks: list[Bottleneck], transformer: SpatialTransformer | None):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.transformer = transformer

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        x = self.blocks(x)
        return x if self.transformer is None else self.transformer(x, conditioning.tokens, conditioning.mask)


@dataclass(frozen=True)
class Pyramid:
    """The shape of a network between pictures, or latents, and a grid of a few cells.

    Attributes:
        in_channels: of the pictures or latents.
        resolution: their height and width.
        patch: side of the squares of them that are one cell of the finest level.
        channels: width of each level, finest first; each halves the resolution of the one before.
        attention: whether each level reads the caption.
        num_blocks: residual blocks a level.
        group_width: channels of a group of the 3×3 convolutions.
        depth: transformer blocks of a level with attention.
        heads: attention heads.
        context_width: features of the conditioning's tokens.
    """

    in_channels: int
    resolution: int
    patch: int
    channels: list[int]
    attention: list[bool]
    num_blocks: int
    group_width: int
    depth: int
    heads: int
    context_width: int

    def __post_init__(self) -> None:
        if len(self.channels) != len(self.attention):
            raise ValueError(
                f"network.pyramid.channels has {len(self.channels)} levels, network.pyramid.attention "
                f"{len(self.attention)}"
            )
        for name, value in (("patch", self.patch), ("group_width", self.group_width)):
            if value < 1:
                raise ValueError(f"network.pyramid.{name}={value}: it must be 1 at least")
        if self.resolution % (self.patch * 2 ** (len(self.channels) - 1)):
            raise ValueError(
                f"{len(self.channels)} levels of network.pyramid.channels on patches of {self.patch} do not divide a "
                f"resolution of {self.resolution}"
            )
        for channels in self.channels:
            if 2 * channels % self.group_width:
                raise ValueError(f"network.pyramid.group_width={self.group_width} does not divide 2 · {channels}")

    @property
    def grid(self) -> int:
        """Cells of the coarsest level in height and width."""
        return self.resolution // (self.patch * 2 ** (len(self.channels) - 1))

    @property
    def features(self) -> int:
        """Values of the coarsest level."""
        return self.channels[-1] * self.grid**2

    def levels(self) -> list[Level]:
        """New ones, finest first; the coarsest has a grid of cells."""
        return [self._level(level) for level in range(len(self.channels))]

    def _level(self, level: int) -> Level:
        channels, size = self.channels[level], self.resolution // (self.patch * 2**level)
        blocks = [Bottleneck(channels, self.group_width) for _ in range(self.num_blocks)]
        if not self.attention[level]:
            return Level(blocks, None)
        transformer = SpatialTransformer(
            channels, self.heads, self.context_width, self.depth, expansion=2, qk_norm=True, positions=(size, size)
        )
        return Level(blocks, transformer)


class Tower(nn.Module):
    """Pictures or latents (B, C, R, R) and their captions -> (B, features), the coarsest level as it is."""

    def __init__(self, pyramid: Pyramid):
        super().__init__()
        self.patch = pyramid.patch
        channels = pyramid.channels
        self.conv_in = nn.Conv2d(pyramid.in_channels * pyramid.patch**2, channels[0], 3, padding=1)
        self.levels = nn.ModuleList(pyramid.levels())
        self.widen = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairwise(channels))

    def forward(self, images: Tensor, conditioning: Conditioning) -> Tensor:
        x = self.levels[0](self.conv_in(F.pixel_unshuffle(images, self.patch)), conditioning)
        for widen, level in zip(self.widen, self.levels[1:], strict=True):
            x = level(widen(F.avg_pool2d(x, 2)), conditioning)
        return x.flatten(1)
