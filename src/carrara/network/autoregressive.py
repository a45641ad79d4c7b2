"""One causal transformer over the tokens of a caption and then those of its picture.

Ramesh et al. 2021, "Zero-shot text-to-image generation" (DALL-E), section 2.2, with the layers of `network/dit`:
RMSNorm, SwiGLU, normalised queries and keys, rotary positions; and every token attends to all before it.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from carrara.network.attention import Attention, axial_angles, features_of_heads, rotary_angles
from carrara.network.cache import Cache
from carrara.network.dit import sinusoidal_positions
from carrara.network.layers import RMSNorm, SwiGLU, zero_
from carrara.network.tokenizer import Tokenizer

Choose = Callable[[Tensor, int], Tensor]  # (logits (n · B, num_codes) float32, place of the token) -> tokens (B,)


class DecoderBlock(nn.Module):
    """Causal self-attention and feed-forward, each after a norm and around a skip."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attention = Attention(width, heads, qk_norm=True, norm=RMSNorm)
        self.norm2 = RMSNorm(width)
        self.feed_forward = SwiGLU(width, hidden)

    def forward(self, x: Tensor, angles: Tensor, cache: Cache | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, N, C), angles (N, C / heads / 2) of their positions -> (B, N, C); with a cache, x are the next N.

        `mask` (B, L) bool: which of all L tokens so far may be attended to, the first among them; None: all.
        """
        x = x + self.attention(self.norm1(x), mask=mask, angles=angles, causal=True, cache=cache)
        return x + self.feed_forward(self.norm2(x))


def continued(
    blocks: Iterable[nn.Module],
    x: Tensor,
    angles: Tensor,
    count: int,
    answer: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    mask: Tensor | None = None,
) -> Tensor:
    """Tokens (B, count), chosen one after the other; each goes through the blocks once.

    Args:
        blocks: `DecoderBlock`s.
        x: (n · B, N, C), what is there before the first; of n captions, where each token is chosen by the logits of n.
        angles: (N + count − 1 or more, C / heads / 2), of all positions.
        answer: (what the blocks make of the last token (n · B, C), place 0 … count − 1) -> the next token (B,), and
            as x has it (n · B, C).
        mask: (n · B, N), see `DecoderBlock`.
    """
    layers = [(block, Cache(len(angles))) for block in blocks]
    at = slice(0, x.shape[1])
    tokens: list[Tensor] = []
    for place in range(count):
        for block, cache in layers:
            x = block(x, angles[at], cache, mask)
        token, following = answer(x[:, -1], place)
        tokens.append(token)
        x, at = following[:, None], slice(at.stop, at.stop + 1)
        mask = None if mask is None else F.pad(mask, (0, 1), value=True)
    return torch.stack(tokens, dim=1)


class TextImageTransformer(nn.Module):
    """Logits of each token from those before it: max_length of the caption, then those of the picture, row by row.

    Text and picture have vocabularies of their own. A short caption is filled up with padding that has a learned vector
    for each position, and is attended to like words (Ramesh et al. 2021, appendix B.2). Words turn with their position,
    the picture's tokens with row and column, of which sinusoidal features are added, too: see `DiT`.

    Args:
        vocab_size: most token ids of captions.
        max_length: tokens of a caption, start, end and padding included; longer ones are cut.
        num_codes: of the discrete auto-encoder.
        width: features of a token; 4 must divide those of a head.
        depth: number of blocks.
        heads: attention heads.
        expansion: hidden width of the feed-forward layers, in widths, rounded.
        checkpointing: recompute blocks in the backward pass instead of keeping their activations.
    """

    not_hidden = ("text_out", "image_out")

    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        num_codes: int,
        width: int,
        depth: int,
        heads: int,
        expansion: float,
        checkpointing: bool = False,
    ):
        super().__init__()
        if num_codes < 2:
            raise ValueError(f"network.num_codes={num_codes}: take a discrete auto-encoder, autoencoder=vq or gumbel")
        self.max_length = max_length
        self.num_codes = num_codes
        self.width = width
        self.head_width = features_of_heads(width, heads, 4)
        self.checkpointing = checkpointing
        self.tokenizer = Tokenizer(vocab_size, max_length)
        self.words = nn.Embedding(vocab_size, width)
        self.padding = nn.Parameter(0.5 * torch.randn(max_length, width))
        self.codes = nn.Embedding(num_codes, width)
        for table in (self.words, self.codes):
            nn.init.normal_(table.weight, std=0.5)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, round(expansion * width)) for _ in range(depth))
        self.norm = RMSNorm(width)
        self.text_out = zero_(nn.Linear(width, vocab_size))
        self.image_out = zero_(nn.Linear(width, num_codes))

    def read(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """ids (B, max_length) int64 and mask (B, max_length) bool, False for padding, of B captions."""
        ids, mask = self.tokenizer(captions)
        rest = (0, self.max_length - ids.shape[1])
        return F.pad(ids, rest).to(self.padding.device), F.pad(mask, rest).to(self.padding.device)

    def forward(self, ids: Tensor, mask: Tensor, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """All logits in one pass.

        Args:
            ids, mask: of `read`.
            tokens: of pictures, (B, h·w) int64, row by row.
            grid: h and w.

        Returns:
            Of the caption's tokens but the first (B, max_length − 1, vocab_size), of the picture's (B, h·w, num_codes).
        """
        positions, angles = self._places(grid)
        before = self.codes(tokens[:, :-1]) + positions[:-1]
        x = torch.cat([self._caption(ids, mask), before], dim=1)
        for block in self.blocks:
            inputs = x, angles[:-1]
            recomputes = self.checkpointing and self.training
            x = checkpoint(block, *inputs, use_reentrant=False) if recomputes else block(*inputs)
        x = self.norm(x)
        last = self.max_length - 1
        return self.text_out(x[:, :last]), self.image_out(x[:, last:])

    def sample(self, ids: Tensor, mask: Tensor, grid: tuple[int, int], choose: Choose) -> Tensor:
        """Tokens of pictures (B, h·w), chosen one after the other; each goes through the network once.

        Args:
            ids, mask: of `read`, of B captions; or of n · B, to choose each token by the logits of n captions.
            grid: h and w.
            choose: is asked for each token, 0 … h·w − 1.
        """
        positions, angles = self._places(grid)

        def answer(x: Tensor, place: int) -> tuple[Tensor, Tensor]:
            token = choose(self.image_out(self.norm(x)).float(), place)
            return token, self.codes(token.repeat(len(ids) // len(token))) + positions[place]

        return continued(self.blocks, self._caption(ids, mask), angles, len(positions), answer)

    def _caption(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, max_length, C)."""
        return torch.where(mask[..., None], self.words(ids), self.padding)

    def _places(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Features (h·w, C) of the picture's places, and angles (max_length + h·w, C / heads / 2) of all tokens."""
        device = self.padding.device
        text = rotary_angles(torch.arange(self.max_length, device=device), self.head_width)
        positions = sinusoidal_positions(*grid, self.width, device).to(self.padding.dtype)
        return positions, torch.cat([text, axial_angles(*grid, self.head_width, device)])
