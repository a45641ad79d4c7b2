"""Captions to the embeddings of pictures that they may be of: what both priors share."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from carrara.model.embedding_prior import EmbeddingPriorModel
from carrara.pipeline.candidates import check_candidates, most_similar


@dataclass(frozen=True)
class EmbeddingPrior:
    """Caption → embeddings, of which the one that CLIP finds most like the caption is taken.

    (Ramesh et al. 2022, "unCLIP", section 2.2, where there are two.)

    Attributes:
        model: of embeddings.
        candidates: embeddings of each caption.
    """

    model: EmbeddingPriorModel
    candidates: int

    def __post_init__(self) -> None:
        check_candidates(self.candidates)

    @torch.no_grad()
    def __call__(self, captions: list[str], indices: Sequence[int], seed: int) -> Tensor:
        """Embeddings (B, E) of mean square 1; caption k of a seed has the same whatever else is in the batch."""
        found = self.found(captions, torch.as_tensor(list(indices)), seed)
        best = most_similar(found, self.model.clip.text_directions(captions))
        return F.normalize(found[best, torch.arange(len(captions))], dim=1) * self.model.clip.embedding_width**0.5

    def found(self, captions: list[str], numbers: Tensor, seed: int) -> Tensor:
        """The candidates (candidates, B, E) float32 of B captions, which have these `numbers` (B,)."""
        raise NotImplementedError
