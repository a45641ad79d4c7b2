"""The cross-entropy of captions' tokens."""

import torch.nn.functional as F
from torch import Tensor


def mean_by_caption(logits: Tensor, tokens: Tensor, chosen: Tensor) -> Tensor:
    """Negative log-probability, a scalar in nats: the mean of each caption's tokens, then of all captions.

    What a caption adds depends on no other one, as it would in the mean over all tokens of a micro-batch: so it is the
    same on any number of ranks.

    Args:
        logits: (N, K) float32.
        tokens: (N,) int64, the true ones.
        chosen: (B, L) bool, where those N are; a caption without any adds 0.
    """
    counts = chosen.sum(1)
    share = (1 / counts.clamp_min(1)).repeat_interleave(counts)
    return (F.cross_entropy(logits, tokens, reduction="none") * share).sum() / len(chosen)
