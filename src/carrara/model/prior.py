"""Training DALL-E 2's prior: from a caption to the embedding that CLIP would give its picture."""

from typing import Any

from torch import Tensor, nn

from carrara.conditioner.base import Conditioner
from carrara.diffusion.objective import Objective
from carrara.evaluator.clip import CLIP
from carrara.model.base import OptimizerFactory
from carrara.model.denoising import DenoisingModel
from carrara.network.conditioning import Conditioning


class PriorModel(DenoisingModel):
    """Diffusion of image embeddings (Ramesh et al. 2022, "unCLIP", section 2.2).

    The network is told the caption's tokens, and CLIP's embedding of it as the pooled vector.

    Args:
        clip: frozen; never the evaluator, which would judge itself.
        network, conditioner, objective, caption_dropout, stratified: see `DenoisingModel`.
        optimizer, warmup_steps, cooldown, max_steps, seed: see `Model`.
    """

    clip: CLIP

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
        super().__init__(
            network, conditioner, objective, caption_dropout, stratified,
            optimizer, warmup_steps, cooldown, max_steps, seed,
        )  # fmt: skip
        clip.requires_grad_(False)
        self.clip = clip.eval()

    def clean(self, batch: dict[str, Any]) -> Tensor:
        return self.clip.image_directions(self.images(batch))

    def conditioning(self, batch: dict[str, Any], drop: Tensor) -> Conditioning:
        captions = ["" if d else caption for d, caption in zip(drop.tolist(), batch["captions"], strict=True)]
        return self.told(captions)

    def told(self, captions: list[str]) -> Conditioning:
        """What the network is told of captions."""
        texts = self.predictor.conditioner(captions)
        return Conditioning(texts.tokens, texts.mask, self.clip.text_directions(captions))
