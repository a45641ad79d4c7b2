"""Training DALL-E 2's other prior: the tokens of an embedding one after the other."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.conditioner.base import Conditioner
from carrara.evaluator.clip import CLIP
from carrara.model.base import OptimizerFactory, share
from carrara.model.conditioned import Conditioned
from carrara.model.embedding_prior import EmbeddingPriorModel
from carrara.network.embedding_transformer import EmbeddingTransformer


class AutoregressivePriorModel(EmbeddingPriorModel):
    """Minimises the mean cross-entropy of an embedding's tokens, in nats (Ramesh et al. 2022, section 2.2).

    Their token for the dot product of the caption's and the picture's embedding is left out.

    Args:
        clip: see `EmbeddingPriorModel`.
        network: whose components are measured before the first step.
        conditioner: captions -> Conditioning, trained along unless it is frozen.
        caption_dropout: probability of training on the empty caption, for guidance.
        optimizer, warmup_steps, cooldown, max_steps, seed: see `Model`.
    """

    kind = "generator"

    def __init__(
        self,
        clip: CLIP,
        network: EmbeddingTransformer,
        conditioner: Conditioner,
        caption_dropout: float,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        cooldown: float,
        max_steps: int,
        seed: int,
    ):
        super().__init__(optimizer, warmup_steps, cooldown, max_steps, seed)
        self.generator = Conditioned(network, conditioner)
        self.keep(clip)
        self.caption_dropout = share("caption_dropout", caption_dropout)

    @property
    def network(self) -> EmbeddingTransformer:
        """The transformer."""
        network = self.generator.network
        assert isinstance(network, EmbeddingTransformer)
        return network

    @property
    def hot(self) -> list[nn.Module]:
        return [self.generator.network]

    @property
    def loss_names(self) -> tuple[str, ...]:
        return ("loss", "quantised_cosine")

    def loss(self, batch: dict[str, Any], u: Tensor | None = None) -> dict[str, Tensor]:
        """The loss; `u` has no times to replace, but with it no caption is dropped.

        In validation with `quantised_cosine`, between embeddings and what their tokens say of them: no more can be had.
        """
        embeddings = self.embeddings(self.images(batch))
        tokens = self.network.tokens.quantise(embeddings)
        drop = torch.zeros_like(batch["positions"], dtype=torch.bool)
        if u is None:
            drop = self.uniform(batch, "caption_dropout") < self.caption_dropout
        logits = self.network(tokens, self.conditioning(batch, drop)).float()
        losses = {"loss": F.cross_entropy(logits.flatten(0, 1), tokens.flatten())}
        if u is not None:
            losses["quantised_cosine"] = F.cosine_similarity(self.network.tokens.dequantise(tokens), embeddings).mean()
        return losses
