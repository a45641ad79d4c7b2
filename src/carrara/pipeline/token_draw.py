"""From the logits of a token to the token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from carrara import keyed_random
from carrara.network.autoregressive import Choose
from carrara.pipeline.candidates import is_count


@dataclass(frozen=True)
class TokenDraw:
    """How tokens are drawn. Guidance comes first, then the temperature, top_k and top_p.

    Attributes:
        temperature: that logits are divided by: below 1 likely tokens become likelier.
        top_k: only so many of the likeliest tokens are drawn from; None for all.
        top_p: only the fewest likeliest tokens that make up this probability (Holtzman et al. 2020, eq. 2); None: all.
        guidance_scale: logits are extrapolated from those of the empty caption to those of the caption, and beyond; 1
            is off.

    Raises:
        ValueError: a setting that is impossible.
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    guidance_scale: float

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"pipeline.temperature={self.temperature} must be above 0; top_k=1 takes the likeliest token"
            )
        if self.top_k is not None and not is_count(self.top_k):
            raise ValueError(f"pipeline.top_k={self.top_k} must be a whole number of tokens from 1 on, or null for all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"pipeline.top_p={self.top_p} must be a probability above 0, or null for all tokens")

    @property
    def guided(self) -> bool:
        """Whether each token takes the logits of the empty caption, too."""
        return self.guidance_scale != 1

    def chooser(self, seed: int, numbers: Tensor, purpose: str) -> Choose:
        """What draws a token of each picture: the draw is the picture's own, drawn on the CPU as all noise is.

        Args:
            seed: of all pictures.
            numbers: (B,) theirs.
            purpose: tells draws for different things apart.

        Returns:
            Of logits (B, K), or (2B, K) where the second half is of the empty caption.
        """

        def choose(logits: Tensor, place: int) -> Tensor:
            if len(logits) > len(numbers):
                positive, negative = logits.chunk(2)
                logits = negative + self.guidance_scale * (positive - negative)
            logits = truncated(logits / self.temperature, self.top_k, self.top_p)
            u = keyed_random.uniform(seed, numbers, f"{purpose}/{place}", tuple(logits.shape[1:]))
            return drawn(logits, u.to(logits.device))

        return choose


def truncated(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits (B, K), −∞ for all but the top_k likeliest tokens and, of those, the fewest that make up top_p."""
    likeliest, order = logits.sort(dim=1, descending=True, stable=True)
    if top_k is not None:
        likeliest[:, top_k:] = -torch.inf
    if top_p is not None:
        probability = likeliest.double().softmax(1).cpu()  # a GPU's cumulative sums are not deterministic
        beyond = probability.cumsum(1) - probability >= top_p
        likeliest = likeliest.masked_fill(beyond.to(likeliest.device), -torch.inf)
    return torch.empty_like(logits).scatter(1, order, likeliest)


def drawn(logits: Tensor, u: Tensor) -> Tensor:
    """Tokens (B,) with the probabilities softmax(logits) of (B, K), by numbers u (B, K) uniform in (0, 1).

    The largest of logits + Gumbel noise is such a draw (Maddison et al. 2014, "A* sampling", section 2). Unlike a
    search in summed probabilities it hangs on the difference of two logits only, so that rounding, which is not the
    same in every batch, all but never changes a picture.
    """
    return (logits - (-u.log()).log()).argmax(1)
