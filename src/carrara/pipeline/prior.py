"""Captions to the embeddings of pictures that they may be of."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from carrara.model.prior import PriorModel
from carrara.pipeline.denoising import Draws, Sampling, denoised


@dataclass(frozen=True)
class Prior:
    """Caption → embeddings, of which the one that CLIP finds most like the caption is taken.

    (Ramesh et al. 2022, "unCLIP", section 2.2, where there are two.)

    Attributes:
        model: of embeddings.
        sampling: how to get from noise to one; a weak model does not guide it.
        candidates: embeddings of each caption.
    """

    model: PriorModel
    sampling: Sampling
    candidates: int

    def __post_init__(self) -> None:
        if not isinstance(self.candidates, int) or self.candidates < 1:
            raise ValueError(f"pipeline.candidates must be a whole number from 1 on, but is {self.candidates}")

    @torch.no_grad()
    def __call__(self, captions: list[str], indices: Sequence[int], seed: int) -> Tensor:
        """Embeddings (B, E) of mean square 1; caption k of a seed has the same whatever else is in the batch."""
        model, width = self.model, self.model.clip.embedding_width
        positive, negative = model.told(captions), model.told([""] * len(captions))
        positions = torch.as_tensor(list(indices))
        found = torch.stack(
            [
                denoised(model, positive, negative, (width,), Draws(seed, positions, f"prior/{k}"), self.sampling)
                for k in range(self.candidates)
            ],
            dim=1,
        )
        best = F.cosine_similarity(found, positive.pooled[:, None], dim=2).argmax(1)
        return F.normalize(found[torch.arange(len(found)), best], dim=1) * width**0.5
