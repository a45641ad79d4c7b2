"""What a noise predictor is told besides the noisy picture and the time."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Encoded captions of a batch, and where a model has one a picture that it starts from.

    Attributes:
        tokens: (B, L, D) one vector a token.
        mask: (B, L) bool, True where a token is real and not padding.
        pooled: (B, P) one vector a caption.
        picture: (B, C, H, W), of the size of x, which the network sees beside x; None for none.
        picture_noise: (B,) the t of the noise in that picture, in [0, 1].
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    picture: Tensor | None = None
    picture_noise: Tensor | None = None

    def with_picture(self, picture: Tensor, noise: Tensor) -> "Conditioning":
        """The same captions with a picture (B, C, H, W) and the t (B,) of its noise."""
        return replace(self, picture=picture, picture_noise=noise)

    def cat(self, other: "Conditioning") -> "Conditioning":
        """The two batches one after the other; the shorter one's tokens are padded."""
        return self._joined(other, lambda a, b: torch.cat([a, b]))

    def where(self, drop: Tensor, other: "Conditioning") -> "Conditioning":
        """`other` for the samples where `drop` (B,) is True, `self` for the rest (classifier-free guidance)."""
        return self._joined(other, lambda a, b: torch.where(drop.reshape(-1, *[1] * (a.ndim - 1)), b, a))

    def _joined(self, other: "Conditioning", join: Callable[[Tensor, Tensor], Tensor]) -> "Conditioning":
        length = max(self.tokens.shape[1], other.tokens.shape[1])
        a, b = self._padded(length), other._padded(length)
        pairs = zip(a._fields, b._fields, strict=True)
        return Conditioning(*(None if x is None or y is None else join(x, y) for x, y in pairs))  # type: ignore[arg-type]

    def take(self, rows: Tensor) -> "Conditioning":
        """That of some samples: rows (N,) int64 or (B,) bool."""
        return Conditioning(*(None if x is None else x[rows] for x in self._fields))  # type: ignore[arg-type]

    def detach(self) -> "Conditioning":
        """The same without a gradient, in float32: for a network that reads it and does not teach it."""
        return Conditioning(self.tokens.detach().float(), self.mask, self.pooled.detach().float())

    @property
    def _fields(self) -> tuple[Tensor | None, ...]:
        return self.tokens, self.mask, self.pooled, self.picture, self.picture_noise

    def _padded(self, length: int) -> "Conditioning":
        extra = length - self.tokens.shape[1]
        if extra == 0:
            return self
        tokens = torch.nn.functional.pad(self.tokens, (0, 0, 0, extra))
        return replace(self, tokens=tokens, mask=torch.nn.functional.pad(self.mask, (0, extra)))
