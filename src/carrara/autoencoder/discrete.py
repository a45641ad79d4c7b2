"""Auto-encoders whose latents are tokens: each place of the latent map holds one of a fixed number of codes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from carrara.autoencoder.convolutional import Convolutional


class Discrete(Convolutional):
    """Images <-> tokens 0 … num_codes − 1, one a latent.

    As an auto-encoder with continuous latents its `posterior` is what comes before the quantisation, without width, and
    `decode` quantises first: a diffusion model in those latents need not hit the codes (Rombach et al. 2022, sec. 3.1,
    VQ-regularised).

    Args:
        num_codes: how many codes there are to choose from.
        latent_channels: of a code.
        downsampling, channels, num_blocks, patch: see `Convolutional`.
    """

    def __init__(
        self, num_codes: int, latent_channels: int, downsampling: int, channels: list[int], num_blocks: int, patch: int
    ):
        if num_codes < 2:
            raise ValueError(f"autoencoder.num_codes={num_codes}: it takes two at least to tell anything")
        super().__init__(latent_channels, latent_channels, downsampling, channels, num_blocks, patch)
        self.num_codes = num_codes

    @property
    def codes(self) -> Tensor:
        """(num_codes, C), on the encoder's own scale."""
        raise NotImplementedError

    def assign(self, z: Tensor) -> Tensor:
        """The tokens (B, h, w) int64 of latents (B, C, h, w) on the encoder's own scale."""
        raise NotImplementedError

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoded(images)
        return z, torch.full_like(z, -torch.inf)

    def decode_raw(self, z: Tensor) -> Tensor:
        return self.decoded(self.quantised(self.assign(z)))

    def tokens(self, images: Tensor) -> Tensor:
        """Of images (B, 3, R, R) in [−1, 1] the tokens (B, h·w) int64, row by row."""
        return self.assign(self.posterior(images)[0]).flatten(1)

    def latents_of(self, tokens: Tensor, h: int, w: int) -> Tensor:
        """The codes (B, C, h, w) of tokens (B, h·w), on the encoder's own scale: what `decode_raw` takes."""
        return self.quantised(tokens.unflatten(1, (h, w)))

    def decode_tokens(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Images (B, 3, height, width), about [−1, 1], of tokens (B, h·w), row by row."""
        _, h, w = self.latent_shape(height, width)
        return self.decoded(self.latents_of(tokens, h, w))

    def quantised(self, tokens: Tensor) -> Tensor:
        """The codes (B, C, h, w) of tokens (B, h, w)."""
        return F.embedding(tokens, self.codes).movedim(-1, 1)


def gumbel(noise: Tensor) -> Tensor:
    """Standard Gumbel numbers −log(−log Φ(noise)) from standard normal ones."""
    return -(-torch.special.log_ndtr(noise)).log()
