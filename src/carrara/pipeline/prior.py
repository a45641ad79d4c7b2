"""Captions to embeddings by diffusion."""

from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.model.prior import PriorModel
from carrara.pipeline.denoising import Draws, Sampling, denoised
from carrara.pipeline.embedding_prior import EmbeddingPrior


@dataclass(frozen=True)
class Prior(EmbeddingPrior):
    """Caption → noise → embeddings.

    Attributes:
        model, candidates: see `EmbeddingPrior`.
        sampling: how to get from noise to an embedding; a weak model does not guide it.
    """

    model: PriorModel
    sampling: Sampling

    def found(self, captions: list[str], numbers: Tensor, seed: int) -> Tensor:
        model, shape = self.model, (self.model.clip.embedding_width,)
        positive, negative = model.told(captions), model.told([""] * len(captions))
        draws = [Draws(seed, numbers, f"prior/{k}") for k in range(self.candidates)]
        return torch.stack([denoised(model, positive, negative, shape, draw, self.sampling) for draw in draws])
