"""Training DALL-E 2's prior as diffusion of embeddings."""

from typing import Any

from torch import Tensor, nn

from carrara.conditioner.base import Conditioner
from carrara.diffusion.objective import Objective
from carrara.evaluator.clip import CLIP
from carrara.model.base import OptimizerFactory
from carrara.model.denoising import DenoisingModel
from carrara.model.embedding_prior import EmbeddingPriorModel


class PriorModel(EmbeddingPriorModel, DenoisingModel):
    """Diffusion of image embeddings (Ramesh et al. 2022, "unCLIP", section 2.2).

    Args:
        clip: see `EmbeddingPriorModel`.
        network, conditioner, objective, caption_dropout, stratified: see `DenoisingModel`.
        optimizer, warmup_steps, cooldown, max_steps, seed: see `Model`.
    """

    def __init__(
        self,
        clip: CLIP,
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
        DenoisingModel.__init__(
            self, network, conditioner, objective, caption_dropout, stratified,
            optimizer, warmup_steps, cooldown, max_steps, seed,
        )  # fmt: skip
        self.keep(clip)

    def clean(self, batch: dict[str, Any]) -> Tensor:
        return self.embeddings(self.images(batch))
