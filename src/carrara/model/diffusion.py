"""Training a noise predictor in the latent space of a frozen auto-encoder (identity: in pixels)."""

from typing import Any

from torch import Tensor, nn

from carrara.autoencoder.base import Autoencoder
from carrara.conditioner.base import Conditioner
from carrara.diffusion.objective import Objective
from carrara.model.base import OptimizerFactory
from carrara.model.denoising import DenoisingModel
from carrara.network.caption_mean import CaptionMean
from carrara.network.conditioning import Conditioning


class DiffusionModel(DenoisingModel):
    """Latent diffusion (Rombach et al. 2022).

    Minimises the objective, and with a `caption_mean_weight` also the error of `CaptionMean`, from which the text
    learns the order of its objects much sooner (`experiments/README.md`). "loss" is the objective's value alone.

    Args:
        autoencoder: frozen.
        caption_mean_weight: of that error; 0 builds no `CaptionMean`.
        network, conditioner, objective, caption_dropout, stratified: see `DenoisingModel`.
        optimizer, warmup_steps, cooldown, max_steps, seed: see `Model`.
    """

    autoencoder: Autoencoder

    def __init__(
        self,
        network: nn.Module,
        conditioner: Conditioner,
        autoencoder: Autoencoder,
        objective: Objective,
        caption_dropout: float,
        stratified: bool,
        caption_mean_weight: float,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        cooldown: float,
        max_steps: int,
        seed: int,
    ):
        super().__init__(
            network, conditioner, objective, caption_dropout, stratified,
            optimizer, warmup_steps, cooldown, max_steps, seed,
        )  # fmt: skip
        autoencoder.requires_grad_(False)
        self.autoencoder = autoencoder.eval()
        self.caption_mean_weight = caption_mean_weight
        self.caption_mean = CaptionMean(autoencoder.latent_channels, conditioner.width) if caption_mean_weight else None

    def clean(self, batch: dict[str, Any]) -> Tensor:
        return self.latents(batch, self.autoencoder)

    def beside(self, denoising: Tensor, conditioning: Conditioning, x0: Tensor) -> dict[str, Tensor]:
        if self.caption_mean is None:
            return super().beside(denoising, conditioning, x0)
        return self.caption_mean.beside(denoising, self.caption_mean_weight, conditioning, x0)
