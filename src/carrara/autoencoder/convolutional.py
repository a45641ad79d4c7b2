"""The convolutional encoder and decoder of the published auto-encoders (Rombach et al. 2022; Esser et al. 2021)."""

import torch.nn.functional as F
from torch import Tensor, nn

from carrara.autoencoder.base import Autoencoder
from carrara.network.attention import Attention
from carrara.network.layers import Downsample, ResidualBlock, Upsample, norm_groups


class Convolutional(Autoencoder):
    """Each level after the first halves the resolution, so downsampling = patch · 2^(levels − 1).

    Args:
        latent_channels: channels of z.
        encoded_channels: of the encoder's answer.
        downsampling: pixels a latent spans; must agree with `channels` and `patch`.
        channels: width of each level, finest first.
        num_blocks: residual blocks a level in the encoder; the decoder has one more.
        patch: side of the squares of pixels folded into channels before the first convolution. 1 is the published
            architecture; 2 saves most of the work, which is at full resolution.
    """

    def __init__(
        self,
        latent_channels: int,
        encoded_channels: int,
        downsampling: int,
        channels: list[int],
        num_blocks: int,
        patch: int,
    ):
        if downsampling != patch * 2 ** (len(channels) - 1):
            raise ValueError(
                f"autoencoder.downsampling={downsampling}, but {len(channels)} levels on patches of {patch} "
                f"give {patch * 2 ** (len(channels) - 1)}: change autoencoder.channels or autoencoder.patch"
            )
        super().__init__(latent_channels, downsampling)
        self.patch = patch
        encoder: list[nn.Module] = [nn.Conv2d(3 * patch**2, channels[0], 3, padding=1)]
        current = channels[0]
        for level, c in enumerate(channels):
            for _ in range(num_blocks):
                encoder.append(ResidualBlock(current, c, eps=1e-6))
                current = c
            if level < len(channels) - 1:
                encoder.append(Downsample(c, padding=(0, 1, 0, 1)))
        self.encoder = nn.Sequential(*encoder, _middle(current), *_head(current, encoded_channels))
        self.quant_conv = nn.Conv2d(encoded_channels, encoded_channels, 1)

        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        decoder: list[nn.Module] = [nn.Conv2d(latent_channels, current, 3, padding=1), _middle(current)]
        for level in reversed(range(len(channels))):
            for _ in range(num_blocks + 1):
                decoder.append(ResidualBlock(current, channels[level], eps=1e-6))
                current = channels[level]
            if level > 0:
                decoder.append(Upsample(current))
        self.decoder = nn.Sequential(*decoder, *_head(current, 3 * patch**2))

    def encoded(self, images: Tensor) -> Tensor:
        """The encoder's answer (B, encoded_channels, h, w)."""
        return self.quant_conv(self.encoder(F.pixel_unshuffle(images, self.patch)))

    def decoded(self, z: Tensor) -> Tensor:
        """The decoder's pictures of latents (B, C, h, w) on the encoder's own scale."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(z)), self.patch)


class PixelAttention(nn.Module):
    """One-head self-attention over a feature map's pixels, around a skip."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups(channels), channels, eps=1e-6)
        self.attention = Attention(channels, heads=1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention(self.norm(x).flatten(2).transpose(1, 2))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


def _middle(channels: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels, eps=1e-6),
        PixelAttention(channels),
        ResidualBlock(channels, channels, eps=1e-6),
    )


def _head(channels: int, out_channels: int) -> list[nn.Module]:
    norm = nn.GroupNorm(norm_groups(channels), channels, eps=1e-6)
    return [norm, nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)]
