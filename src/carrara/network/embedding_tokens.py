"""Embeddings as tokens: their principal components, each in one of so many buckets."""

import torch
from torch import Tensor, nn

from carrara.errors import UserError
from carrara.network.layers import without_autocast


class EmbeddingTokens(nn.Module):
    """Embeddings (B, E) <-> tokens (B, N) int64, that of the largest component first (Ramesh et al. 2022, section 2.2).

    Components and their ranges are measured once, on training pictures, and lie in the state dict. A range, from the
    least to the greatest value, is cut into buckets of one width; values beyond it go into the outermost bucket.

    Args:
        embedding_width: E.
        num_components: N, as many as are kept.
        num_buckets: of each component.

    Raises:
        ValueError: more components than the embedding has, or a number of components or buckets that is none.
    """

    mean: Tensor
    components: Tensor
    low: Tensor
    bucket_width: Tensor

    def __init__(self, embedding_width: int, num_components: int, num_buckets: int):
        super().__init__()
        if not 1 <= num_components <= embedding_width:
            raise ValueError(
                f"network.num_components={num_components} must be from 1 to {embedding_width}, the embedding's width"
            )
        if num_buckets < 2:
            raise ValueError(f"network.num_buckets={num_buckets} must be a whole number from 2 on")
        self.num_buckets = num_buckets
        self.register_buffer("mean", torch.zeros(embedding_width))
        self.register_buffer("components", torch.zeros(num_components, embedding_width))
        self.register_buffer("low", torch.zeros(num_components))
        self.register_buffer("bucket_width", torch.ones(num_components))

    @property
    def measured(self) -> bool:
        """Whether the components are known."""
        return bool(self.components.any())

    @torch.no_grad()
    def measure(self, embeddings: Tensor) -> None:
        """Find components and ranges of embeddings (M, E).

        Raises:
            UserError: there are no more embeddings than components.
        """
        if len(embeddings) <= len(self.components):
            raise UserError(
                f"network.num_components={len(self.components)} cannot be found in {len(embeddings)} pictures: "
                "take fewer components, or more data"
            )
        x = embeddings.double()
        mean = x.mean(0)
        x = x - mean
        _, vectors = torch.linalg.eigh(x.T @ x)  # eigenvalues rise
        components = vectors.T.flip(0)[: len(self.components)]
        values = x @ components.T
        width = (values.amax(0) - values.amin(0)) / self.num_buckets
        self.mean.copy_(mean)
        self.components.copy_(components)
        self.low.copy_(values.amin(0))
        self.bucket_width.copy_(width.clamp_min(torch.finfo(torch.float32).tiny))  # one value makes no range

    def quantise(self, embeddings: Tensor) -> Tensor:
        """embeddings (B, E) -> tokens (B, N)."""
        with without_autocast(embeddings):
            values = (embeddings.float() - self.mean) @ self.components.T
        bucket = ((values - self.low) / self.bucket_width).floor()
        return bucket.clamp(0, self.num_buckets - 1).long()

    def dequantise(self, tokens: Tensor) -> Tensor:
        """tokens (B, N) -> embeddings (B, E) float32 from the middles of their buckets."""
        values = self.low + (tokens + 0.5) * self.bucket_width
        with without_autocast(tokens):
            return self.mean + values @ self.components
