"""What a noise predictor is told besides the noisy picture and the time."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Encoded captions of a batch.

    Attributes:
        tokens: (B, L, D) one vector a token.
        mask: (B, L) bool, True where a token is real and not padding.
        pooled: (B, P) one vector a caption.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    def cat(self, other: "Conditioning") -> "Conditioning":
        """The two batches one after the other; the shorter one's tokens are padded."""
        length = max(self.tokens.shape[1], other.tokens.shape[1])
        a, b = self._padded(length), other._padded(length)
        return Conditioning(*(torch.cat(pair) for pair in zip(a._fields, b._fields, strict=True)))

    def where(self, drop: Tensor, other: "Conditioning") -> "Conditioning":
        """`other` for the samples where `drop` (B,) is True, `self` for the rest (classifier-free guidance)."""
        length = max(self.tokens.shape[1], other.tokens.shape[1])
        a, b = self._padded(length), other._padded(length)
        return Conditioning(
            torch.where(drop[:, None, None], b.tokens, a.tokens),
            torch.where(drop[:, None], b.mask, a.mask),
            torch.where(drop[:, None], b.pooled, a.pooled),
        )

    def detach(self) -> "Conditioning":
        """The same without a gradient, in float32: for a network that reads it and does not teach it."""
        return Conditioning(self.tokens.detach().float(), self.mask, self.pooled.detach().float())

    @property
    def _fields(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tokens, self.mask, self.pooled

    def _padded(self, length: int) -> "Conditioning":
        extra = length - self.tokens.shape[1]
        if extra == 0:
            return self
        tokens = torch.nn.functional.pad(self.tokens, (0, 0, 0, extra))
        return Conditioning(tokens, torch.nn.functional.pad(self.mask, (0, extra)), self.pooled)
