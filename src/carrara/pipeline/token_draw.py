"""From the logits of a token to the token."""

import torch
from torch import Tensor


def truncated(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits (B, K), −∞ for all but the top_k likeliest tokens and, of those, the fewest that make up top_p."""
    likeliest, order = logits.sort(dim=1, descending=True, stable=True)
    if top_k is not None:
        likeliest[:, top_k:] = -torch.inf
    if top_p is not None:
        probability = likeliest.double().softmax(1)
        likeliest = likeliest.masked_fill(probability.cumsum(1) - probability >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter(1, order, likeliest)


def drawn(logits: Tensor, u: Tensor) -> Tensor:
    """Tokens (B,) with the probabilities softmax(logits) of (B, K), by numbers u (B, K) uniform in (0, 1).

    The largest of logits + Gumbel noise is such a draw (Maddison et al. 2014, "A* sampling", section 2). Unlike a
    search in summed probabilities it hangs on the difference of two logits only, so that rounding, which is not the
    same in every batch, all but never changes a picture.
    """
    return (logits - (-u.log()).log()).argmax(1)
