"""Vector-quantised auto-encoder (van den Oord et al. 2017, "Neural discrete representation learning")."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from carrara.autoencoder.codebook import Codebook
from carrara.autoencoder.discrete import Discrete, gumbel


class VQ(Discrete):
    """Each latent is replaced by the nearest code; the gradient passes straight through to the encoder.

    Args:
        num_codes, latent_channels, downsampling, channels, num_blocks, patch: see `Discrete`.
        commitment_weight: of the mean squared distance of a latent's values from its code's (eq. 3).
        decay, restart_below: of the codebook, see `Codebook`.
    """

    logged: ClassVar[tuple[str, ...]] = ("commitment",)

    def __init__(
        self,
        num_codes: int,
        latent_channels: int,
        downsampling: int,
        channels: list[int],
        num_blocks: int,
        patch: int,
        commitment_weight: float,
        decay: float,
        restart_below: float,
    ):
        super().__init__(num_codes, latent_channels, downsampling, channels, num_blocks, patch)
        self.commitment_weight = commitment_weight
        self.codebook = Codebook(num_codes, latent_channels, decay, restart_below)

    @property
    def codes(self) -> Tensor:
        return self.codebook.codes

    def assign(self, z: Tensor) -> Tensor:
        return self.codebook.nearest(_rows(z)).view(len(z), *z.shape[2:])

    def noise_shape(self, height: int, width: int) -> tuple[int, ...]:
        """One number a latent: which of them dead codes restart at."""
        return self.latent_shape(height, width)[1:]

    def training_pass(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        z = self.posterior(images)[0].float()
        tokens = self.assign(z.detach())
        if self.training:
            self.codebook.collect(_rows(z.detach()), tokens.flatten(), gumbel(noise).flatten())
        code = self.quantised(tokens)
        commitment = F.mse_loss(z, code)
        return self.decoded(z + (code - z).detach()), self.commitment_weight * commitment, {"commitment": commitment}

    def after_step(self) -> None:
        self.codebook.update()


def _rows(z: Tensor) -> Tensor:
    """(B, C, h, w) -> (B·h·w, C)."""
    return z.movedim(1, -1).flatten(0, 2)
