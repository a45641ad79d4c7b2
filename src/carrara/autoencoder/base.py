"""What every auto-encoder promises."""

from typing import ClassVar

import torch
from torch import Tensor, nn


class Autoencoder(nn.Module):
    """Images in [−1, 1] <-> latents of mean 0 and standard deviation 1 per channel.

    The statistics are measured once, after training, and stored with the weights: nobody else scales latents.

    Attributes:
        latent_channels: channels of z.
        downsampling: how many pixels a latent spans in height and width.
        is_identity: whether the latents are the pixels themselves.
        is_bounded: whether the latents lie in [−1, 1], as pixels do.
        logged: the names of the values that `training_pass` gives to be logged.
    """

    is_identity = False
    is_bounded = False
    logged: ClassVar[tuple[str, ...]] = ()

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, latent_channels: int, downsampling: int):
        super().__init__()
        self.latent_channels = latent_channels
        self.downsampling = downsampling
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, C, h, w) of q(z | image), on the encoder's own scale, not normalised."""
        raise NotImplementedError

    def decode_raw(self, z: Tensor) -> Tensor:
        """Images from latents on the encoder's own scale."""
        raise NotImplementedError

    def training_pass(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What it is trained on besides how well pictures come back.

        Args:
            images: (B, 3, R, R) in [−1, 1].
            noise: (B, *noise_shape(R, R)), standard normal.

        Returns:
            The reconstruction (B, 3, R, R); the scalar that is added to its error, already weighted; and scalars to
            be logged, by the names in `logged`.
        """
        raise NotImplementedError

    def noise_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Of the noise that `training_pass` wants for a picture (3, height, width)."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Called in training after each optimizer step's batch, on all ranks: for what is not learned by gradient."""

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised latents: a sample of the posterior with standard normal `noise` (B, C, h, w), else its mean."""
        mean, logvar = self.posterior(images)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return (z - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def decode(self, z: Tensor) -> Tensor:
        """Images, about [−1, 1], from normalised latents."""
        return self.decode_raw(z * self.latent_std[:, None, None] + self.latent_mean[:, None, None])

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store the per-channel statistics (C,) of the encoder's latents."""
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Of the latents (C, h, w) of pictures (3, height, width)."""
        return self.latent_channels, height // self.downsampling, width // self.downsampling
