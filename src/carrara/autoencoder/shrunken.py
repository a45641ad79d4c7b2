"""Latents that are the picture itself, smaller; and a decoder that learns to enlarge it."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.autoencoder.base import Autoencoder
from carrara.network.layers import ResidualBlock, norm_groups
from carrara.network.resize import enlarge, shrink


class Shrunken(Autoencoder):
    """Small pictures as latents, in [−1, 1], and bicubic enlargement as decoder; nothing is trained or measured.

    Diffusion in these latents is diffusion of small pictures: the first stage of a cascade (Ho et al. 2022).

    Args:
        latent_channels: 3.
        downsampling: of height and width.
    """

    is_bounded = True

    def __init__(self, latent_channels: int, downsampling: int):
        if latent_channels != 3:
            raise ValueError("autoencoder.latent_channels: latents that are small pictures have 3")
        super().__init__(latent_channels, downsampling)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        small = shrink(images, self.downsampling)
        return small, torch.full_like(small, -torch.inf)

    def decode_raw(self, z: Tensor) -> Tensor:
        return enlarge(z.float(), self.downsampling).clamp(-1, 1)


class Enlarger(Shrunken):
    """The seeds' first decoder: trained to make the picture of its shrunken version, which is the latent.

    It adds to the bicubic enlargement what residual blocks find, at the small picture's size up to the last layer,
    which spreads its channels over the large one's pixels (Shi et al. 2016, "sub-pixel convolution").

    Args:
        latent_channels, downsampling: see `Shrunken`.
        width: channels of the blocks.
        num_blocks: residual blocks.
    """

    is_bounded = False  # normalised, as those of any trained auto-encoder
    logged: ClassVar[tuple[str, ...]] = ()

    def __init__(self, latent_channels: int, downsampling: int, width: int, num_blocks: int):
        super().__init__(latent_channels, downsampling)
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, width, 3, padding=1),
            *(ResidualBlock(width, width) for _ in range(num_blocks)),
            nn.GroupNorm(norm_groups(width), width),
            nn.SiLU(),
            nn.Conv2d(width, 3 * downsampling**2, 3, padding=1),
        )

    def decode_raw(self, z: Tensor) -> Tensor:
        return super().decode_raw(z) + F.pixel_shuffle(self.decoder(z), self.downsampling)

    def bicubic(self, images: Tensor) -> Tensor:
        """What comes back of pictures (B, 3, R, R) without anything learnt."""
        return super().decode_raw(shrink(images, self.downsampling))

    def noise_shape(self, height: int, width: int) -> tuple[int, ...]:
        return (0,)  # a shrunken picture is not drawn

    def training_pass(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        small, _ = self.posterior(images)
        return self.decode_raw(small), small.new_zeros(()), {}
