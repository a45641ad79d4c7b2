"""Discrete auto-encoder by a relaxed choice, DALL-E's dVAE (Ramesh et al. 2021, section 2.1 and appendix A.2)."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from carrara.autoencoder.discrete import Discrete, gumbel
from carrara.divergence import kl_to_uniform
from carrara.network.layers import without_autocast


class Gumbel(Discrete):
    """A categorical distribution over the codes at each place, with the uniform one as its prior.

    Unlike the paper's its logits are a linear map of few latent channels, in which a diffusion model can work, too.

    In training the decoder sees the codes' average under weights softmax((logits + Gumbel noise) / temperature), at a
    low temperature close to a sample (Jang et al. 2017, eq. 2); otherwise the likeliest code.

    Args:
        num_codes, latent_channels, downsampling, channels, num_blocks, patch: see `Discrete`.
        kl_weight: of the KL divergence from the uniform distribution, in nats a token.
        temperature: that it falls to, from 1, along half a cosine.
        anneal_steps: optimizer steps that this takes.
    """

    logged: ClassVar[tuple[str, ...]] = ("kl",)
    not_hidden = ("logits",)

    step: Tensor

    def __init__(
        self,
        num_codes: int,
        latent_channels: int,
        downsampling: int,
        channels: list[int],
        num_blocks: int,
        patch: int,
        kl_weight: float,
        temperature: float,
        anneal_steps: int,
    ):
        if not 0 < temperature <= 1:
            raise ValueError(f"autoencoder.temperature={temperature}: it falls from 1 to a number above 0")
        if anneal_steps < 1:
            raise ValueError(f"autoencoder.anneal_steps={anneal_steps}: it must be 1 at least")
        super().__init__(num_codes, latent_channels, downsampling, channels, num_blocks, patch)
        self.kl_weight = kl_weight
        self.last_temperature = temperature
        self.anneal_steps = anneal_steps
        self.logits = nn.Conv2d(latent_channels, num_codes, 1)
        self.embedding = nn.Embedding(num_codes, latent_channels)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def codes(self) -> Tensor:
        return self.embedding.weight

    @property
    def temperature(self) -> Tensor:
        """At this step, a scalar."""
        progress = (self.step / self.anneal_steps).clamp(max=1)
        return self.last_temperature + (1 - self.last_temperature) * 0.5 * (1 + torch.cos(math.pi * progress))

    def assign(self, z: Tensor) -> Tensor:
        return self.log_odds(z).argmax(1)

    def log_odds(self, z: Tensor) -> Tensor:
        """The codes' logits (B, K, h, w) float32, whatever the autocast: a token must not depend on it."""
        with without_autocast(z):
            return self.logits(z.float())

    def noise_shape(self, height: int, width: int) -> tuple[int, ...]:
        return self.num_codes, *self.latent_shape(height, width)[1:]

    def training_pass(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        z, _ = self.posterior(images)
        logits = self.log_odds(z)
        kl = kl_to_uniform(logits, dim=1).mean()
        if self.training:
            weights = ((logits + gumbel(noise)) / self.temperature).softmax(1)
            code = torch.einsum("bkhw,kc->bchw", weights, self.codes)
        else:
            code = self.quantised(logits.argmax(1))
        return self.decoded(code), self.kl_weight * kl, {"kl": kl}

    def after_step(self) -> None:
        self.step += 1
