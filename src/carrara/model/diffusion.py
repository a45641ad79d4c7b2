"""Training a noise predictor in the latent space of a frozen auto-encoder (identity: in pixels)."""

from typing import Any

import torch
from torch import Tensor, nn

from carrara.autoencoder.base import Autoencoder
from carrara.conditioner.base import Conditioner
from carrara.diffusion.objective import Objective
from carrara.model.base import Model, OptimizerFactory
from carrara.model.conditioned import Conditioned
from carrara.network.caption_mean import CaptionMean
from carrara.network.conditioning import Conditioning


class DiffusionModel(Model):
    """Latent diffusion (Rombach et al. 2022), trained by DDPM's Algorithm 1 with any schedule, target and times.

    Minimises the objective, and with a `caption_mean_weight` also the error of `CaptionMean`, from which the text
    learns the order of its objects much sooner (`experiments/README.md`). "loss" is the objective's value alone.

    Args:
        network: the noise predictor, network(x, time, conditioning) -> like x.
        conditioner: captions -> Conditioning, trained along unless it is frozen.
        autoencoder: frozen.
        objective: from clean latents to a loss.
        caption_dropout: probability of training on the empty caption (classifier-free guidance).
        stratified: spread the times of a batch evenly over their distribution (Kingma et al. 2021, appendix I.1)
            instead of drawing each by itself.
        caption_mean_weight: of that error; 0 builds no `CaptionMean`.
        optimizer, warmup_steps, cooldown, max_steps, seed: see `Model`.
    """

    kind = "noise_predictor"
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
        super().__init__(optimizer, warmup_steps, cooldown, max_steps, seed)
        self.predictor = Conditioned(network, conditioner)
        autoencoder.requires_grad_(False)
        self.autoencoder = autoencoder.eval()
        self.objective = objective
        self.caption_dropout = caption_dropout
        self.stratified = stratified
        self.caption_mean_weight = caption_mean_weight
        self.caption_mean = CaptionMean(autoencoder.latent_channels, conditioner.width) if caption_mean_weight else None

    @property
    def exported(self) -> nn.Module:
        return self.predictor

    @property
    def hot(self) -> list[nn.Module]:
        return [self.predictor.network]

    def loss(self, batch: dict[str, Any], u: Tensor | None = None) -> dict[str, Tensor]:
        x0 = self.latents(batch, self.autoencoder)
        training = u is None
        drop = torch.zeros_like(batch["positions"], dtype=torch.bool)
        if u is None:  # times and drops keyed by the position in the stream
            u = self.spread(batch, "time") if self.stratified else self.uniform(batch, "time")
            drop = self.uniform(batch, "caption_dropout") < self.caption_dropout
        conditioning = self._conditioning(batch, drop)
        eps = self.normal(batch, "noise", tuple(x0.shape[1:]))

        predict = self.objective.predict(self.predictor.network, conditioning)
        denoising = self.objective.loss(predict, x0, eps, u).mean()
        if self.caption_mean is None or not training:
            return {"loss": denoising}
        return self.caption_mean.beside(denoising, self.caption_mean_weight, conditioning, x0)

    def _conditioning(self, batch: dict[str, Any], drop: Tensor) -> Conditioning:
        """What the network is told; of the empty caption where `drop` (B,) says so."""
        return self.predictor.conditioning(batch, drop)
