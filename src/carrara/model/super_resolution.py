"""Training the second stage of a cascade: pictures from their shrunken versions and captions."""

from typing import Any

from torch import Tensor, nn

from carrara.autoencoder.base import Autoencoder
from carrara.conditioner.base import Conditioner
from carrara.diffusion.objective import Objective
from carrara.model.base import OptimizerFactory
from carrara.model.diffusion import DiffusionModel
from carrara.network.conditioning import Conditioning
from carrara.network.resize import enlarge, shrink


class SuperResolutionModel(DiffusionModel):
    """Diffusion with the picture's shrunken, noised version beside x (Ho et al. 2022, "Cascaded diffusion models").

    The small picture is noised at a time s drawn evenly from [0, max_augmentation], which the network is told
    ("conditioning augmentation", section 4.2; Saharia et al. 2022, "Imagen", section 2.3): it learns not to rely on
    what a first stage gets wrong. Captions are dropped for guidance, the small picture never is.

    Args:
        factor: by which pictures are shrunk.
        max_augmentation: the largest s, in (0, 1].
        network: takes a picture beside x.
        autoencoder: the identity.
        conditioner, objective, caption_dropout, stratified: see `DiffusionModel`.
        optimizer, warmup_steps, cooldown, max_steps, seed: see `Model`.
    """

    takes_latents = False  # the small pictures are made of the pictures

    def __init__(
        self,
        factor: int,
        max_augmentation: float,
        network: nn.Module,
        conditioner: Conditioner,
        autoencoder: Autoencoder,
        objective: Objective,
        caption_dropout: float,
        stratified: bool,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        cooldown: float,
        max_steps: int,
        seed: int,
    ):
        if factor < 1:
            raise ValueError(f"model.factor={factor} must be a whole number from 1 on")
        if not 0 < max_augmentation <= 1:
            raise ValueError(f"model.max_augmentation must lie in (0, 1], but is {max_augmentation}")
        if not autoencoder.is_identity:
            raise ValueError("pictures are enlarged as they are, not as latents: take autoencoder=identity")
        super().__init__(
            network, conditioner, autoencoder, objective, caption_dropout, stratified, 0.0,
            optimizer, warmup_steps, cooldown, max_steps, seed,
        )  # fmt: skip
        self.factor = factor
        self.max_augmentation = max_augmentation

    def conditioning(self, batch: dict[str, Any], drop: Tensor) -> Conditioning:
        small = shrink(self.images(batch), self.factor)
        s = self.max_augmentation * self.uniform(batch, "augmentation").to(small)
        eps = self.normal(batch, "augmentation_noise", tuple(small.shape[1:]))
        return self.starting_from(super().conditioning(batch, drop), small, s, eps)

    def starting_from(self, texts: Conditioning, small: Tensor, s: Tensor, eps: Tensor) -> Conditioning:
        """What the network is told: texts, and small pictures (B, 3, h, w) noised with eps at times s (B,), enlarged.

        The noise is added before the enlargement, where the first stage makes its mistakes, and the picture is scaled
        as what is denoised: EDM's noise is up to 80 times as wide.
        """
        t = s.double()
        noised = self.objective.scaled(self.objective.add_noise(small, eps, t), t)
        return texts.with_picture(enlarge(noised, self.factor), s)
