"""Convolutional auto-encoder with a Gaussian posterior (Kingma & Welling 2014; Rombach et al. 2022)."""

from typing import ClassVar

from torch import Tensor

from carrara.autoencoder.convolutional import Convolutional
from carrara.divergence import kl_to_standard_normal


class KL(Convolutional):
    """KL auto-encoder.

    Args:
        latent_channels, downsampling, channels, num_blocks, patch: see `Convolutional`.
        kl_weight: of the KL divergence in nats per latent value.
    """

    logged: ClassVar[tuple[str, ...]] = ("kl",)

    def __init__(
        self,
        latent_channels: int,
        downsampling: int,
        channels: list[int],
        num_blocks: int,
        patch: int,
        kl_weight: float,
    ):
        super().__init__(latent_channels, 2 * latent_channels, downsampling, channels, num_blocks, patch)
        self.kl_weight = kl_weight

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.encoded(images).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode_raw(self, z: Tensor) -> Tensor:
        return self.decoded(z)

    def noise_shape(self, height: int, width: int) -> tuple[int, ...]:
        return self.latent_shape(height, width)

    def training_pass(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        mean, logvar = (x.float() for x in self.posterior(images))
        kl = kl_to_standard_normal(mean, logvar).mean() / mean[0].numel()
        return self.decode_raw(mean + (0.5 * logvar).exp() * noise), self.kl_weight * kl, {"kl": kl}
