"""Training an auto-encoder: reconstruction, its own penalty, and from some step on an adversary."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.autoencoder.base import Autoencoder
from carrara.model.base import Model, OptimizerFactory
from carrara.model.perceptual import Perceptual


class AutoencoderModel(Model):
    """Minimises reconstruction + the auto-encoder's penalty + adversarial_weight · generator's hinge loss.

    The discriminator learns in the same step by the same optimizer: its loss sees detached reconstructions, the
    generator's loss goes through a detached copy of its weights, so one backward pass serves both and a batch counts
    as one step (two Lightning optimizers would count it twice).

    Args:
        autoencoder: what is trained.
        perceptual: the path of a VGG16 whose features are compared, see `Perceptual`; None for none.
        perceptual_weight: of that distance.
        adversarial_weight: of the generator's loss; 0 builds no discriminator.
        adversarial_start: optimizer step from which the generator feels the discriminator.
        optimizer, warmup_steps, cooldown, max_steps, seed: see `Model`.
    """

    kind = "autoencoder"

    def __init__(
        self,
        autoencoder: Autoencoder,
        perceptual: str | None,
        perceptual_weight: float,
        adversarial_weight: float,
        adversarial_start: int,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        cooldown: float,
        max_steps: int,
        seed: int,
    ):
        if not list(autoencoder.parameters()):
            raise ValueError(f"autoencoder: {type(autoencoder).__name__} has nothing to train; take autoencoder=kl")
        super().__init__(optimizer, warmup_steps, cooldown, max_steps, seed)
        self.autoencoder = autoencoder
        self.perceptual = None if perceptual is None else Perceptual(perceptual).requires_grad_(False)
        self.perceptual_weight = perceptual_weight
        self.discriminator = PatchDiscriminator() if adversarial_weight else None
        self.adversarial_weight = adversarial_weight
        self.adversarial_start = adversarial_start

    @property
    def loss_names(self) -> tuple[str, ...]:
        perceptual = ("perceptual",) if self.perceptual is not None else ()
        return ("loss", "reconstruction", *self.autoencoder.logged, *perceptual)

    @property
    def hot(self) -> list[nn.Module]:
        return list(self.autoencoder.children())

    def loss(self, batch: dict[str, Any], u: Tensor | None = None) -> dict[str, Tensor]:
        images = self.images(batch)
        noise = self.normal(batch, "posterior", self.autoencoder.noise_shape(*images.shape[2:]))
        reconstruction, penalty, logged = self.autoencoder.training_pass(images, noise)
        reconstruction = reconstruction.float()
        losses = {"reconstruction": F.mse_loss(reconstruction, images)} | logged
        loss = losses["reconstruction"] + penalty
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual.distance(reconstruction, images).mean()
            loss = loss + self.perceptual_weight * losses["perceptual"]
        if self.discriminator is not None and u is None:  # not in validation: it is a moving judge, and not exported
            losses |= self._adversarial(self.discriminator, images, reconstruction)
            active = float(self.global_step >= self.adversarial_start)
            loss = loss + active * self.adversarial_weight * losses["generator"] + losses["discriminator"]
        return {"loss": loss} | losses

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.autoencoder.after_step()

    def _adversarial(self, discriminator: nn.Module, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Hinge losses (Lim & Ye 2017) of both players."""
        still = {name: p.detach() for name, p in discriminator.named_parameters()}
        judged = discriminator(torch.cat([real, fake.detach()]))
        on_real, on_fake = judged.chunk(2)
        return {
            "generator": -torch.func.functional_call(discriminator, still, (fake,)).mean(),
            "discriminator": 0.5 * (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()),
        }

    @torch.no_grad()
    def finish(self, batches: Iterable[Tensor]) -> None:
        """Per-channel mean and std of sampled latents, by which `encode` normalises (Rombach et al. 2022, sec. G)."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for images in batches:
            mean, logvar = (x.double() for x in self.autoencoder.posterior(images))
            count += mean.numel() // mean.shape[1]
            total = total.to(mean) + mean.sum((0, 2, 3))
            squares = squares.to(mean) + (mean**2 + logvar.exp()).sum((0, 2, 3))
        average = total / count
        self.autoencoder.set_statistics(average.float(), (squares / count - average**2).sqrt().float())


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) -> logits (B, 1, h, w), one a patch (Isola et al. 2017)."""

    def __init__(self, width: int = 64, depth: int = 3):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for _ in range(depth - 1):
            layers += [
                nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
                nn.GroupNorm(32, 2 * width),
                nn.LeakyReLU(0.2),
            ]
            width *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)
