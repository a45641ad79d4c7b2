"""Training DALL-E 2's decoder: pictures from their CLIP embeddings."""

from typing import Any

from torch import Tensor, nn

from carrara.autoencoder.base import Autoencoder
from carrara.conditioner.image_embedding import ImageEmbedding
from carrara.diffusion.objective import Objective
from carrara.evaluator.clip import CLIP
from carrara.model.base import OptimizerFactory, share
from carrara.model.diffusion import DiffusionModel
from carrara.network.conditioning import Conditioning


class UnCLIPModel(DiffusionModel):
    """Latent diffusion on CLIP's embedding of the picture itself (Ramesh et al. 2022, "unCLIP", section 2.1).

    Captions are not read: they come in through the prior.

    Args:
        clip: frozen; never the evaluator, which would judge itself.
        embedding_dropout: probability of training on no embedding (classifier-free guidance).
        network, conditioner, autoencoder, objective, stratified: see `DiffusionModel`.
        optimizer, warmup_steps, cooldown, max_steps, seed: see `Model`.
    """

    takes_latents = False  # CLIP sees the picture itself
    clip: CLIP

    def __init__(
        self,
        clip: CLIP,
        embedding_dropout: float,
        network: nn.Module,
        conditioner: ImageEmbedding,
        autoencoder: Autoencoder,
        objective: Objective,
        stratified: bool,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        cooldown: float,
        max_steps: int,
        seed: int,
    ):
        if not isinstance(conditioner, ImageEmbedding):
            raise ValueError("the decoder reads no captions: take conditioner=image_embedding")
        if getattr(network, "pooled_embedding", network) is None:
            raise ValueError(
                f"the embedding goes beside the time, too: pass network.pooled_width={conditioner.width}, not 0"
            )
        share("embedding_dropout", embedding_dropout)
        super().__init__(
            network, conditioner, autoencoder, objective, embedding_dropout, stratified, 0.0,
            optimizer, warmup_steps, cooldown, max_steps, seed,
        )  # fmt: skip
        clip.requires_grad_(False)
        self.clip = clip.eval()

    def conditioning(self, batch: dict[str, Any], drop: Tensor) -> Conditioning:
        conditioner = self.predictor.conditioner
        assert isinstance(conditioner, ImageEmbedding)
        return conditioner(conditioner.dropped(self.clip.image_directions(self.images(batch)), drop))
