"""A small text transformer, used by the conditioner and by the evaluator's text tower."""

import torch
from torch import Tensor, nn

from carrara.network.attention import Attention, rotary_angles
from carrara.network.layers import GEGLU


class EncoderBlock(nn.Module):
    """Self-attention and feed-forward, each after a LayerNorm and around a skip."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, qk_norm=True)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = GEGLU(width, expansion=2)

    def forward(self, x: Tensor, mask: Tensor | None = None, angles: Tensor | None = None) -> Tensor:
        """x (B, N, C), mask (B, N) bool, True for real tokens, angles of rotary positions -> (B, N, C)."""
        x = x + self.attention(self.norm1(x), mask=mask, angles=angles)
        return x + self.feed_forward(self.norm2(x))


class TextTransformer(nn.Module):
    """Bidirectional transformer encoder over token ids, with rotary positions and normalised queries and keys.

    Those two let it tell "a red ring left of a blue cross" from its reverse within a few hundred steps. With a small
    learned vector added at each position, the text stayed a bag of words for as long as a short training lasts.

    Args:
        vocab_size: number of token ids.
        max_length: most tokens a caption may have.
        width: features of a token.
        depth: number of blocks.
        heads: attention heads.
    """

    angles: Tensor

    def __init__(self, vocab_size: int, max_length: int, width: int, depth: int, heads: int):
        super().__init__()
        self.width = width
        self.tokens = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("angles", rotary_angles(torch.arange(max_length), width // heads), persistent=False)
        nn.init.normal_(self.tokens.weight, std=0.5)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, L) int64, mask (B, L) bool -> tokens (B, L, C) and their mean over real tokens (B, C)."""
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x, mask, self.angles[: ids.shape[1]])
        x = self.norm(x)
        weight = mask[..., None].to(x.dtype)
        return x, (x * weight).sum(1) / weight.sum(1).clamp_min(1)
