"""A picture's embedding instead of a caption."""

import torch
from torch import Tensor, nn

from carrara.conditioner.base import Conditioner
from carrara.network.conditioning import Conditioning


class ImageEmbedding(Conditioner):
    """Embeddings (B, E) -> a few tokens and a pooled vector (Ramesh et al. 2022, "unCLIP", section 2.1).

    Args:
        embedding_width: E.
        width: see `Conditioner`.
        num_tokens: that an embedding becomes; 4 in the paper.
    """

    def __init__(self, embedding_width: int, width: int, num_tokens: int = 4):
        super().__init__(width)
        self.num_tokens = num_tokens
        self.tokens = nn.Linear(embedding_width, num_tokens * width)
        self.pooled = nn.Linear(embedding_width, width)
        self.nothing = nn.Parameter(torch.zeros(embedding_width))

    def forward(self, embeddings: Tensor, /) -> Conditioning:
        tokens = self.tokens(embeddings).unflatten(1, (self.num_tokens, self.width))
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Conditioning(tokens, mask, self.pooled(embeddings))

    def dropped(self, embeddings: Tensor, drop: Tensor) -> Tensor:
        """The embeddings, and where `drop` (B,) says so the learned one of no picture in particular."""
        return torch.where(drop[:, None], self.nothing, embeddings)
