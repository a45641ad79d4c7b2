"""Training a conditional variational auto-encoder, from whose prior pictures are made."""

import math
from typing import Any

from torch import Tensor, nn

from carrara.conditioner.base import Conditioner
from carrara.diffusion.likelihood import discretized_gaussian
from carrara.divergence import kl_diagonal
from carrara.model.base import Model, OptimizerFactory
from carrara.model.conditioned import Conditioned, caption_mean
from carrara.network.variational import Variational


class VAEModel(Model):
    """Maximises the evidence lower bound of log p(picture | caption) (Kingma & Welling 2014; Sohn et al. 2015).

    Pictures have 256 levels, of which the likelihood is the Gaussian's mass: `bits_per_dim` is a bound on what it
    takes to store them, to be compared with any other model's. "loss", "reconstruction" and "kl" are in nats per
    value of a picture.

    Args:
        network: both halves.
        conditioner: captions -> Conditioning, trained along unless it is frozen.
        caption_mean_weight: of the error of `CaptionMean`, from which the text learns its words; see
            `caption_mean`.
        optimizer, warmup_steps, cooldown, max_steps, seed: see `Model`.
    """

    kind = "generator"

    def __init__(
        self,
        network: Variational,
        conditioner: Conditioner,
        caption_mean_weight: float,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        cooldown: float,
        max_steps: int,
        seed: int,
    ):
        super().__init__(optimizer, warmup_steps, cooldown, max_steps, seed)
        self.generator = Conditioned(network, conditioner)
        self.noise_shape = network.noise_shape
        self.caption_mean_weight = caption_mean_weight
        self.caption_mean = caption_mean(3, conditioner, caption_mean_weight)

    @property
    def network(self) -> Variational:
        network = self.generator.network
        assert isinstance(network, Variational)
        return network

    @property
    def hot(self) -> list[nn.Module]:
        return [self.network.encoder, self.network.generator]

    @property
    def loss_names(self) -> tuple[str, ...]:
        return ("loss", "reconstruction", "kl", "bits_per_dim")

    def decode(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, R, R) of what the generator makes: they are pictures."""
        return x

    def loss(self, batch: dict[str, Any], u: Tensor | None = None) -> dict[str, Tensor]:
        images, network = self.images(batch), self.network
        conditioning = self.generator.conditioner(batch["captions"])
        mean, logvar = network.posterior(images, conditioning)
        z = mean + (0.5 * logvar).exp() * self.normal(batch, "posterior", self.noise_shape)
        picture = network.generator(z, conditioning).float()
        per_value = 1 / images[0].numel()
        losses = {
            "reconstruction": -discretized_gaussian(images, picture, network.log_std.exp()).mean().float(),
            "kl": kl_diagonal(mean, logvar, *network.prior(conditioning)).mean() * per_value,
        }
        bound = losses["reconstruction"] + losses["kl"]
        losses["bits_per_dim"] = bound / math.log(2)
        if self.caption_mean is None or u is not None:
            return {"loss": bound} | losses
        return losses | self.caption_mean.beside(bound, self.caption_mean_weight, conditioning, images)
