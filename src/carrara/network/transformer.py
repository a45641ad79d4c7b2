"""A small text transformer, used by the conditioner and by the evaluator's text tower."""

import torch
from torch import Tensor, nn

from carrara.network.layers import GEGLU, Attention


class EncoderBlock(nn.Module):
    """Self-attention and feed-forward, each after a LayerNorm and around a skip."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = GEGLU(width, expansion=2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, C), mask (B, N) bool, True for real tokens -> (B, N, C)."""
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.feed_forward(self.norm2(x))


class TextTransformer(nn.Module):
    """Bidirectional transformer encoder over token ids.

    Args:
        vocab_size: number of token ids.
        max_length: most tokens a caption may have.
        width: features of a token.
        depth: number of blocks.
        heads: attention heads.
    """

    def __init__(self, vocab_size: int, max_length: int, width: int, depth: int, heads: int):
        super().__init__()
        self.width = width
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(0.02 * torch.randn(max_length, width))
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, L) int64, mask (B, L) bool -> tokens (B, L, C) and their mean over real tokens (B, C)."""
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        weight = mask[..., None].to(x.dtype)
        return x, (x * weight).sum(1) / weight.sum(1).clamp_min(1)
