"""Attention, and the rotary positions of its queries and keys."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.network.cache import Cache


def features_of_heads(width: int, heads: int, multiple: int = 1) -> int:
    """Features of each of the heads that share a width.

    Args:
        multiple: that they must be of, for rotary positions: 2, in two dimensions 4.

    Raises:
        ValueError: the width is not so many heads.
    """
    if heads < 1 or width % (heads * multiple):
        sizes = ", ".join(str(k * multiple) for k in (1, 2, 3))
        raise ValueError(f"a width of {width} is not {heads} heads of {sizes} … features: change heads or width")
    return width // heads


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q kᵀ / √d) v over the last two dimensions (B, heads, N, d); `mask`, True to attend, broadcasts.

    `causal`: the queries are those of the last keys, and each attends to its own key and those before it.

    The backward pass of torch's fused attention on the CPU is 3 to 6 times slower than these three operations for
    the short sequences of a small picture in bfloat16 (torch 2.13, 16 to 64 tokens), so there it is not used.
    """
    n, length = q.shape[-2], k.shape[-2]
    explicit = q.device.type == "cpu" and q.dtype == torch.bfloat16 and n <= 128 and torch.is_grad_enabled()
    if causal and mask is None and n == length and not explicit:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)  # without a mask it may be the fastest kernel
    if causal and n > 1:
        past = torch.ones(n, length, dtype=torch.bool, device=q.device).tril(length - n)
        mask = past if mask is None else mask & past
    if explicit:
        weights = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if mask is not None:
            weights = weights.masked_fill(~mask, -torch.inf)
        return weights.softmax(dim=-1) @ v
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], n, length)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def rotary_angles(positions: Tensor, features: int, base: float = 10_000.0) -> Tensor:
    """The angle by which each pair of features turns at each position (Su et al. 2021, "RoFormer", eq. 15).

    Args:
        positions: (N,).
        features: of a head; even.
        base: the longest wave is 2π·base positions long.

    Returns:
        (N, features / 2).
    """
    if features % 2:
        raise ValueError(f"rotary positions turn pairs of features, but a head has {features}")
    frequencies = base ** (-torch.arange(features // 2, device=positions.device) / (features // 2))
    return positions[:, None] * frequencies


def axial_angles(height: int, width: int, features: int, device: torch.device | None = None) -> Tensor:
    """Rotary angles of a picture: half of a head's pairs turn with the row, half with the column.

    Heo et al. 2024, "Rotary position embedding for vision transformer", section 3: RoPE-Axial. Their base, too: a
    side of a picture is about the square root of a text in length, and so is 100 of 10,000.

    Args:
        height, width: rows and columns of tokens.
        features: of a head; a multiple of 4.
        device: of the answer.

    Returns:
        (height · width, features / 2), row by row.
    """
    if features % 4:
        raise ValueError(f"rotary positions in two dimensions need a multiple of 4 features, but a head has {features}")
    rows = rotary_angles(torch.arange(height, device=device), features // 2, base=100.0)
    columns = rotary_angles(torch.arange(width, device=device), features // 2, base=100.0)
    return over_grid(rows, columns)


def over_grid(rows: Tensor, columns: Tensor) -> Tensor:
    """Features of rows (H, F) and of columns (W, F) -> both of each token of a picture (H · W, 2F), row by row."""
    height, width = len(rows), len(columns)
    return torch.cat([rows.repeat_interleave(width, dim=0), columns.repeat(height, 1)], dim=1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (i, i + d/2) of the features of x (..., N, d) by angles (N, d/2); lengths stay, in x's dtype."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


_layer_norm = partial(nn.LayerNorm, bias=False)


class Attention(nn.Module):
    """Multi-head attention; self-attention without a context, cross-attention with one.

    Args:
        width: features of the queries' tokens and of the output.
        heads: number of heads; must divide `width`.
        context_width: features of the context's tokens; `width` if None.
        bias: whether the projections to query, key and value have a bias.
        qk_norm: a norm on queries and keys, so that no logit runs away (Dehghani et al. 2023, "Scaling vision
            transformers to 22 billion parameters", section 2); over all heads at once, as rows of a head's few
            features take the CPU three times as long.
        norm: width -> that norm.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        context_width: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        norm: Callable[[int], nn.Module] = _layer_norm,
    ):
        super().__init__()
        features_of_heads(width, heads)
        context_width = width if context_width is None else context_width
        self.heads = heads
        self.query_norm = norm(width) if qk_norm else nn.Identity()
        self.key_norm = norm(width) if qk_norm else nn.Identity()
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(context_width, width, bias=bias)
        self.value = nn.Linear(context_width, width, bias=bias)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        angles: Tensor | None = None,
        causal: bool = False,
        cache: Cache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, N, C).
            context: (B, L, D).
            mask: (B, L) bool, True for what may be attended to; with a cache, of all tokens so far.
            angles: (N, C / heads / 2) of `rotary_angles`, for self-attention with rotary positions.
            causal: self-attention of each token to itself and those before it.
            cache: of self-attention: x are the next tokens, and those in the cache are attended to as well; of
                cross-attention: the context's keys and values are made at the first call and then taken from here.

        Returns:
            (B, N, C).
        """
        q = self._heads(self.query_norm(self.query(x)))
        q = q if angles is None else rotate(q, angles)
        tokens = x if context is None else context
        if cache is None:
            k, v = self._keys_values(tokens, angles)
        else:
            if context is None or cache.length == 0:
                cache.append(*self._keys_values(tokens, angles))
            k, v = cache.keys_values
        y = attend(q, k, v, None if mask is None else mask[:, None, None, :], causal)
        return self.out(y.transpose(1, 2).flatten(2))

    def _keys_values(self, tokens: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor]:
        k, v = self._heads(self.key_norm(self.key(tokens))), self._heads(self.value(tokens))
        return k if angles is None else rotate(k, angles), v

    def _heads(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, C / heads)."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
