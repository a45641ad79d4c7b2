"""Captions to pictures in one call of a generator (and one of a decoder): GANs and variational auto-encoders."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.model.gan import GANModel
from carrara.model.vae import VAEModel
from carrara.pipeline.base import OnStep
from carrara.pipeline.denoising import Draws


@dataclass(frozen=True)
class OneStep:
    """Noise and caption → picture; nothing is on the way to be seen.

    Attributes:
        model: generator and conditioner, with the weights they have now.
        temperature: the noise's standard deviation; below 1 pictures are more alike and, as a rule, cleaner (the
            truncation of Brock et al. 2019, "Large scale GAN training", section 3.1, without its resampling).
    """

    model: GANModel | VAEModel
    temperature: float

    num_steps = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"pipeline.temperature must be a number from 0 on, not {self.temperature!r}")

    @torch.no_grad()
    def __call__(self, captions: list[str], indices: Sequence[int], seed: int, on_step: OnStep | None = None) -> Tensor:
        """One picture a caption; see `Pipeline`. `on_step` is never called."""
        network, conditioning = self.model.generator.network, self.model.generator.conditioner(captions)
        draws = Draws(seed, torch.as_tensor(list(indices)))
        noise = draws.of_shape(self.model.noise_shape, conditioning.pooled.device)()
        return self.decode(network(self.temperature * noise, conditioning))

    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, R, R) in [−1, 1] from what the generator makes."""
        return self.model.decode(z).float().clamp(-1, 1)
