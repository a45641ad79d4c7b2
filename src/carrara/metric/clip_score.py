"""CLIP score: how near pictures and their captions lie in an evaluator's embedding space."""

import torch
from torch import Tensor
from torch.nn import functional as F

from carrara.metric.float64_metric import Float64Metric


def clip_scores(image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
    """100 · max(cos, 0) of each pair, float64 (B,) in [0, 100]; embeddings (B, D), normalised here.

    Hessel et al. 2021 clamp each pair too, and scale by 2.5; the factor 100 is torchmetrics', which
    clamps only the mean. Scores of different evaluators are not comparable.
    """
    return 100 * F.cosine_similarity(image_embeddings.double(), text_embeddings.double(), dim=1).clamp_min(0)


class CLIPScore(Float64Metric):
    """Mean of `clip_scores` over all pairs. The evaluator must not be the generator's own text encoder."""

    higher_is_better: bool | None = True
    score_sum: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("score_sum")
        self.add_sum("count")

    def update(self, image_embeddings: Tensor, text_embeddings: Tensor) -> None:
        """Add pairs: embeddings (B, D) and (B, D) of pictures and of their captions, of any length."""
        self.score_sum = self.score_sum + clip_scores(image_embeddings, text_embeddings).sum()
        self.count = self.count + len(image_embeddings)

    def compute(self) -> Tensor:
        """The mean score, a float64 scalar in [0, 100]; nan before any pair."""
        return torch.as_tensor(self.score_sum / self.count)
