"""The network that restores pictures: convolutions alone, so pictures of any size."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.network.layers import zero_


class Block(nn.Module):
    """x + conv(relu(conv(x))), which starts as x (Lim et al. 2017, "Enhanced deep residual networks", section 3.1)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = zero_(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class DRUNet(nn.Module):
    """Noisy pictures (B, 3, H, W) -> as many, of any height and width.

    A U-Net of residual blocks without norms or attention (Zhang et al. 2021, "Plug-and-play image restoration with
    deep denoiser prior", section 3.1); their channels are [64, 128, 256, 512], their num_blocks is 4. Unlike theirs it
    is told no level of noise, and has biases: text has colours of its own.

    Args:
        channels: width of each level, finest first; each level halves the resolution of the one before.
        num_blocks: residual blocks a level on the way down, at the bottom, and a level on the way up.
        residual: answer with the picture and what is to be added to it (Zhang et al. 2017, "Beyond a Gaussian
            denoiser", section 3.2).
    """

    not_hidden = ("conv_in", "conv_out")

    def __init__(self, channels: list[int], num_blocks: int, residual: bool):
        super().__init__()
        if not channels or num_blocks < 1:
            raise ValueError(
                f"network.channels={channels} and network.num_blocks={num_blocks}: it needs a level, and a block in it"
            )
        self.residual = residual
        steps = list(pairwise(channels))  # to a level from the one above it
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down = nn.ModuleList(_level(width, num_blocks) for width in channels[:-1])
        self.downsample = nn.ModuleList(nn.Conv2d(above, below, 2, stride=2) for above, below in steps)
        self.middle = _level(channels[-1], num_blocks)
        # what a transposed convolution is that has a stride of its own width, as a matrix that Muon takes
        self.upsample = nn.ModuleList(
            nn.Sequential(nn.Conv2d(below, 4 * above, 1), nn.PixelShuffle(2)) for above, below in reversed(steps)
        )
        self.up = nn.ModuleList(_level(width, num_blocks) for width in reversed(channels[:-1]))
        self.conv_out = zero_(nn.Conv2d(channels[0], 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        multiple = 2 ** len(self.downsample)
        given = F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        # channels last: on a CPU convolutions of so few channels take half as long (experiments/README.md)
        x = self.conv_in(given.contiguous(memory_format=torch.channels_last))
        skips = []
        for level, downsample in zip(self.down, self.downsample, strict=True):
            x = level(x)
            skips.append(x)
            x = downsample(x)
        x = self.middle(x)
        for level, upsample in zip(self.up, self.upsample, strict=True):
            x = level(upsample(x) + skips.pop())
        answer = self.conv_out(x)
        return (given + answer if self.residual else answer)[:, :, :height, :width]


def _level(width: int, num_blocks: int) -> nn.Sequential:
    return nn.Sequential(*(Block(width) for _ in range(num_blocks)))
