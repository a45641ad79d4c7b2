"""What all models that learn to denoise share: DDPM's Algorithm 1, of whatever is to be generated."""

from typing import Any

import torch
from torch import Tensor, nn

from carrara.conditioner.base import Conditioner
from carrara.diffusion.objective import Objective
from carrara.model.base import Model, OptimizerFactory, share
from carrara.model.conditioned import Conditioned
from carrara.network.conditioning import Conditioning


class DenoisingModel(Model):
    """A noise predictor trained with any schedule, target and times (Ho et al. 2020, Algorithm 1).

    Args:
        network: the noise predictor, network(x, time, conditioning) -> like x.
        conditioner: captions -> Conditioning, trained along unless it is frozen.
        objective: from what is clean to a loss.
        caption_dropout: probability of training on the empty caption (classifier-free guidance).
        stratified: spread the times of a batch evenly over their distribution (Kingma et al. 2021, appendix I.1)
            instead of drawing each by itself.
        optimizer, warmup_steps, cooldown, max_steps, seed: see `Model`.
    """

    kind = "noise_predictor"

    def __init__(
        self,
        network: nn.Module,
        conditioner: Conditioner,
        objective: Objective,
        caption_dropout: float,
        stratified: bool,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        cooldown: float,
        max_steps: int,
        seed: int,
    ):
        super().__init__(optimizer, warmup_steps, cooldown, max_steps, seed)
        self.predictor = Conditioned(network, conditioner)
        self.objective = objective
        self.caption_dropout = share("caption_dropout", caption_dropout)
        self.stratified = stratified

    @property
    def exported(self) -> nn.Module:
        return self.predictor

    @property
    def hot(self) -> list[nn.Module]:
        return [self.predictor.network]

    def loss(self, batch: dict[str, Any], u: Tensor | None = None) -> dict[str, Tensor]:
        x0 = self.clean(batch)
        training = u is None
        drop = torch.zeros_like(batch["positions"], dtype=torch.bool)
        if u is None:  # times and drops keyed by the position in the stream
            u = self.spread(batch, "time") if self.stratified else self.uniform(batch, "time")
            drop = self.uniform(batch, "caption_dropout") < self.caption_dropout
        conditioning = self.conditioning(batch, drop)
        eps = self.normal(batch, "noise", tuple(x0.shape[1:]))

        predict = self.objective.predict(self.predictor.network, conditioning)
        denoising = self.objective.loss(predict, x0, eps, u).mean()
        return self.beside(denoising, conditioning, x0) if training else {"loss": denoising}

    def clean(self, batch: dict[str, Any]) -> Tensor:
        """What is to be generated, x0 (B, ...) float32, without noise."""
        raise NotImplementedError

    def conditioning(self, batch: dict[str, Any], drop: Tensor) -> Conditioning:
        """What the network is told; of the empty caption where `drop` (B,) says so."""
        return self.predictor.conditioning(batch, drop)

    def beside(self, denoising: Tensor, conditioning: Conditioning, x0: Tensor) -> dict[str, Tensor]:
        """The losses of training, "loss" among them, whose value is that of `denoising`."""
        return {"loss": denoising}
