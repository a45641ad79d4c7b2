"""Several candidates of each caption, of which CLIP takes the best."""

import torch.nn.functional as F
from torch import Tensor


def is_count(number: object) -> bool:
    """Whether it is a whole number from 1 on."""
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def check_candidates(candidates: int) -> None:
    """There is one at least.

    Raises:
        ValueError: it is no such number.
    """
    if not is_count(candidates):
        raise ValueError(f"pipeline.candidates={candidates} must be a whole number from 1 on")


def most_similar(embeddings: Tensor, texts: Tensor) -> Tensor:
    """Of candidates' embeddings (candidates, B, E) the one (B,) int64 nearest to each caption's, texts (B, E)."""
    return F.cosine_similarity(embeddings, texts, dim=2).argmax(0)
