"""Training a normalizing flow by maximum likelihood, in a frozen auto-encoder's latents (identity: in pixels)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from carrara import keyed_random
from carrara.autoencoder.base import Autoencoder
from carrara.conditioner.base import Conditioner
from carrara.model.base import Model, OptimizerFactory, share
from carrara.model.conditioned import Conditioned, caption_mean

LEVEL = 1 / 127.5  # what one of 256 levels takes of [−1, 1]


class FlowModel(Model):
    """Minimises −log p(x | caption) / dimensions, in nats, of pictures with a little noise (Zhai et al. 2024, 2.4).

    A density of pictures that are whole numbers has no upper bound, so noise is added: Gaussian, which makes the
    better pictures once the sampler has taken it away again, or uniform within a level, for which the likelihood is a
    lower bound of the whole numbers' (Theis et al. 2016, section 3.1), logged as `bits_per_dim`.

    Args:
        network: network(x, conditioning) -> z, log|det ∂z/∂x|, as `carrara.network.tarflow`.
        conditioner: captions -> Conditioning, trained along unless it is frozen.
        autoencoder: frozen.
        noise_std: of the Gaussian noise, where x is in [−1, 1] or has standard deviation 1; None: uniform noise.
        caption_dropout: probability of training on the empty caption, for guidance.
        caption_mean_weight: of the error of `CaptionMean`, as in `carrara.model.diffusion`; see
            `caption_mean`.
        optimizer, warmup_steps, cooldown, max_steps, seed: see `Model`.
    """

    kind = "generator"
    takes_latents = True
    autoencoder: Autoencoder

    def __init__(
        self,
        network: nn.Module,
        conditioner: Conditioner,
        autoencoder: Autoencoder,
        noise_std: float | None,
        caption_dropout: float,
        caption_mean_weight: float,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        cooldown: float,
        max_steps: int,
        seed: int,
    ):
        super().__init__(optimizer, warmup_steps, cooldown, max_steps, seed)
        if noise_std is None and not autoencoder.is_identity:
            raise ValueError("model.noise_std=null is for pixels, and latents have no levels: give it a number")
        if noise_std is not None and not noise_std > 0:
            raise ValueError(f"model.noise_std={noise_std} leaves the density without bounds: take 0.05, or null")
        self.generator = Conditioned(network, conditioner)
        autoencoder.requires_grad_(False)
        self.autoencoder = autoencoder.eval()
        self.noise_std = noise_std
        self.caption_dropout = share("caption_dropout", caption_dropout)
        self.caption_mean_weight = caption_mean_weight
        self.caption_mean = caption_mean(autoencoder.latent_channels, conditioner, caption_mean_weight)

    @property
    def hot(self) -> list[nn.Module]:
        return [self.generator.network]

    @property
    def loss_names(self) -> tuple[str, ...]:
        return ("loss", "bits_per_dim") if self.noise_std is None else ("loss",)

    def loss(self, batch: dict[str, Any], u: Tensor | None = None) -> dict[str, Tensor]:
        """The loss; `u` has no times to replace, but with it no caption is dropped."""
        x0 = self.latents(batch, self.autoencoder)
        drop = torch.zeros_like(batch["positions"], dtype=torch.bool)
        if u is None:
            drop = self.uniform(batch, "caption_dropout") < self.caption_dropout
        conditioning = self.generator.conditioning(batch, drop)
        z, logdet = self.generator.network(self.noisy(x0, batch), conditioning)
        nats = (-log_likelihood(z, logdet) / x0[0].numel()).mean()
        losses = {"loss": nats}
        if self.noise_std is None:
            losses["bits_per_dim"] = nats.detach() / math.log(2) - math.log2(LEVEL)
        if self.caption_mean is not None and u is None:
            losses |= self.caption_mean.beside(nats, self.caption_mean_weight, conditioning, x0)
        return losses

    def noisy(self, x0: Tensor, batch: dict[str, Any]) -> Tensor:
        """The batch's latents x0 (B, C, h, w) with their noise."""
        shape = tuple(x0.shape[1:])
        if self.noise_std is not None:
            return x0 + self.noise_std * self.normal(batch, "noise", shape)
        within = keyed_random.uniform(self.seed, batch["positions"], "noise", shape)
        return x0 + LEVEL * (within - 0.5)


def log_likelihood(z: Tensor, logdet: Tensor) -> Tensor:
    """log p(x) in nats, (B,), of x that become z (B, ...) standard normal by a map with log|det ∂z/∂x| (B,)."""
    return logdet - 0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)
