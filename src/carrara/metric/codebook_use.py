"""How much of a discrete auto-encoder's codebook its tokens use."""

import torch
from torch import Tensor

from carrara.metric.float64_metric import Float64Metric


class CodebookUse(Float64Metric):
    """Share of codes that occur at all, and the perplexity of how often each does: num_codes if all do equally.

    Both grow with the number of tokens: compare only at equal counts.

    Args:
        num_codes: K.
    """

    counts: Tensor

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.add_sum("counts", num_codes)

    def update(self, tokens: Tensor) -> None:
        """Add tokens, integers in 0 … K − 1, of any shape."""
        self.counts = self.counts + torch.bincount(tokens.flatten(), minlength=len(self.counts))

    def compute(self) -> dict[str, Tensor]:
        """{"codebook_use": share, "codebook_perplexity": exp of the entropy}, float64 scalars."""
        share = self.counts / self.counts.sum()
        return {
            "codebook_use": (self.counts > 0).double().mean(),
            "codebook_perplexity": torch.special.entr(share).sum().exp(),
        }
