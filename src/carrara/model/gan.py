"""Training a generator against a discriminator, in a frozen auto-encoder's latents (identity: in pixels)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from carrara.autoencoder.base import Autoencoder
from carrara.conditioner.base import Conditioner
from carrara.model.base import Model, OptimizerFactory
from carrara.model.conditioned import Conditioned, caption_mean
from carrara.model.optimizer import parameter_groups
from carrara.network.conditioning import Conditioning
from carrara.network.generator import Generator

Judge = Callable[[Tensor], Tensor]  # pictures or latents (B, C, h, w) -> logits (B,)


class GANModel(Model):
    """R3GAN (Huang et al. 2024, "The GAN is dead; long live the GAN! A modern baseline GAN"), told the captions.

    Both players learn in one step by one optimizer, as in `AutoencoderModel`: the discriminator's loss sees detached
    pictures, the generator's a detached copy of the discriminator's weights. Muon gives them the steps of AdamW, with
    betas of their own, and its own to the text. The conditioner is the generator's: the discriminator reads what it
    says and does not train it. A real and a generated picture of one caption are
    compared (eq. 2), so that their difference is in what the caption leaves open, or in what the generator gets wrong.

    In validation there is no loss: what two players lose to each other does not say how good either is.

    Args:
        network: the generator, network(noise, conditioning) -> latents, with a `noise_shape`.
        conditioner: captions -> Conditioning, trained along unless it is frozen.
        discriminator: latents, conditioning -> logits (B,).
        autoencoder: frozen.
        gradient_penalty: γ of the penalties R1 and R2.
        penalty_share: probability, in (0, 1], that they are measured at a sample and then divided by it; they cost more
            than all the rest.
        caption_mean_weight: of the error of `CaptionMean`, from which the text learns its words; see
            `caption_mean`.
        player_betas: of both players' AdamW. A low first one, for what was downhill a while ago is not where the other
            player stands now.
        text_learning_rate: of the text and of `CaptionMean`; the optimizer's own is the players'.
        optimizer, warmup_steps, cooldown, max_steps, seed: see `Model`.
    """

    kind = "generator"
    takes_latents = True
    autoencoder: Autoencoder

    def __init__(
        self,
        network: Generator,
        conditioner: Conditioner,
        discriminator: nn.Module,
        autoencoder: Autoencoder,
        gradient_penalty: float,
        penalty_share: float,
        caption_mean_weight: float,
        player_betas: tuple[float, float],
        text_learning_rate: float,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        cooldown: float,
        max_steps: int,
        seed: int,
    ):
        if not 0 < penalty_share <= 1:
            raise ValueError(f"model.penalty_share must lie in (0, 1], but is {penalty_share}")
        if not all(0 <= beta < 1 for beta in player_betas) or not text_learning_rate > 0:
            raise ValueError(
                f"model.player_betas={list(player_betas)} must lie in [0, 1), model.text_learning_rate="
                f"{text_learning_rate} above 0"
            )
        super().__init__(optimizer, warmup_steps, cooldown, max_steps, seed)
        self.generator = Conditioned(network, conditioner)
        self.noise_shape = network.noise_shape
        self.discriminator = discriminator
        autoencoder.requires_grad_(False)
        self.autoencoder = autoencoder.eval()
        self.gradient_penalty = gradient_penalty
        self.penalty_share = penalty_share
        self.caption_mean_weight = caption_mean_weight
        self.caption_mean = caption_mean(autoencoder.latent_channels, conditioner, caption_mean_weight)
        self.player_betas = player_betas
        self.text_learning_rate = text_learning_rate

    @property
    def hot(self) -> list[nn.Module]:
        return [self.generator.network]  # the discriminator is differentiated twice, which compiled code is not

    @property
    def loss_names(self) -> tuple[str, ...]:
        return ()

    def parameter_groups(self) -> list[dict]:
        players = nn.ModuleList([self.generator.network, self.discriminator])
        text = nn.ModuleList([self.generator.conditioner, self.caption_mean or nn.Identity()])
        own = {"muon": False, "betas": self.player_betas}
        return [group | own for group in parameter_groups(players)] + [
            group | {"lr": self.text_learning_rate} for group in parameter_groups(text)
        ]

    def loss(self, batch: dict[str, Any], u: Tensor | None = None) -> dict[str, Tensor]:
        if u is not None:
            return {}
        real = self.latents(batch, self.autoencoder)
        conditioning = self.generator.conditioning(batch, torch.zeros_like(batch["positions"], dtype=torch.bool))
        noise = self.normal(batch, "noise", self.noise_shape)
        fake = self.generator.network(noise, conditioning).float()
        told = conditioning.detach()
        on_real, on_fake = (self.discriminator(x, told).float() for x in (real, fake.detach()))
        losses = {
            "discriminator": F.softplus(on_fake - on_real).mean(),
            "penalty": self.penalty(batch, real, fake, told),
        }
        still = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        on_fake = torch.func.functional_call(self.discriminator, still, (fake, told)).float()
        losses["generator"] = F.softplus(on_real.detach() - on_fake).mean()
        loss = losses["generator"] + losses["discriminator"] + self.gradient_penalty / 2 * losses["penalty"]
        if self.caption_mean is None:
            return {"loss": loss} | losses
        return losses | self.caption_mean.beside(loss, self.caption_mean_weight, conditioning, real)

    def penalty(self, batch: dict[str, Any], real: Tensor, fake: Tensor, told: Conditioning) -> Tensor:
        """An estimate of the batch's mean of `gradient_penalty`, in float32 whatever the autocast."""
        chosen = self.uniform(batch, "penalty") < self.penalty_share  # the same ones on any number of ranks
        if not chosen.any():
            return real.new_zeros(())
        shown = told.take(chosen)
        with torch.autocast(real.device.type, enabled=False):
            found = gradient_penalty(lambda x: self.discriminator(x, shown), real[chosen], fake[chosen].detach())
        return found.sum() / (self.penalty_share * len(real))

    def decode(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, R, R) of what the generator makes."""
        return self.autoencoder.decode(x)


def gradient_penalty(judge: Judge, real: Tensor, fake: Tensor) -> Tensor:
    """|∇D(real)|² + |∇D(fake)|² (B,), R1 and R2 without γ/2 (Huang et al. 2024, eq. 3), differentiable themselves.

    Args:
        judge: the discriminator; float32, differentiable twice.
        real, fake: (B, C, h, w), without a gradient.
    """
    real, fake = real.clone().requires_grad_(), fake.clone().requires_grad_()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no second derivative
        slopes = torch.autograd.grad((judge(real) + judge(fake)).sum(), (real, fake), create_graph=True)
    return sum((slope.square().flatten(1).sum(1) for slope in slopes), start=real.new_zeros(len(real)))
