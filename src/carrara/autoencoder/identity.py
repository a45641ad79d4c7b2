"""No auto-encoder: the latents are the pixels, and latent diffusion's code does pixel diffusion."""

import torch
from torch import Tensor

from carrara.autoencoder.base import Autoencoder


class Identity(Autoencoder):
    """Pictures are their own latents; nothing is trained or measured."""

    is_identity = True
    is_bounded = True

    def __init__(self, latent_channels: int = 3, downsampling: int = 1):
        if (latent_channels, downsampling) != (3, 1):
            raise ValueError("autoencoder=identity has latent_channels=3 and downsampling=1")
        super().__init__(latent_channels, downsampling)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, torch.full_like(images, -torch.inf)

    def decode_raw(self, z: Tensor) -> Tensor:
        return z
