"""A normalizing flow of pictures: causal transformers over patches, each an affine autoregressive flow.

Zhai et al. 2024, "Normalizing flows are capable generative models" (TarFlow), with the layers of `network/dit`. Unlike
there, the first patch of a block is changed too, as the caption says: the sequence begins with an empty patch.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from carrara.network.attention import Attention, axial_angles, features_of_heads
from carrara.network.cache import Cache
from carrara.network.conditioning import Conditioning
from carrara.network.dit import sinusoidal_positions
from carrara.network.layers import RMSNorm, SwiGLU, without_autocast, zero_

Guide = Callable[[Tensor], Tensor]  # shifts and log-scales (k · B, 1, 2D) of a patch -> those to take (B, 1, 2D)


class CausalBlock(nn.Module):
    """Causal self-attention of the patches, cross-attention to the text, feed-forward, each around a skip."""

    def __init__(self, width: int, heads: int, hidden: int, context_width: int):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.self_attention = Attention(width, heads, qk_norm=True, norm=RMSNorm)
        self.norm2 = RMSNorm(width)
        self.cross_attention = Attention(width, heads, context_width, qk_norm=True, norm=RMSNorm)
        zero_(self.cross_attention.out)
        self.norm3 = RMSNorm(width)
        self.feed_forward = SwiGLU(width, hidden)

    def forward(
        self, x: Tensor, text: Tensor, mask: Tensor, angles: Tensor, caches: tuple[Cache, Cache] | None = None
    ) -> Tensor:
        """Tokens (B, N, C), text (B, L, D), mask (B, L), angles of the N, caches of both attentions -> (B, N, C)."""
        own, texts = (None, None) if caches is None else caches
        x = x + self.self_attention(self.norm1(x), angles=angles, causal=True, cache=own)
        x = x + self.cross_attention(self.norm2(x), text, mask, cache=texts)
        return x + self.feed_forward(self.norm3(x))


class FlowBlock(nn.Module):
    """z_i = (x_i − μ_i) e^(−α_i), where μ_i and α_i are made of the x before x_i, and of the text (section 2.2).

    It begins as the identity.

    Args:
        features: D of a patch.
        backwards: whether the sequence begins with the last patch.
        width, depth, heads, context_width, pooled_width, checkpointing: see `TarFlow`.
        hidden: of the feed-forward layers.
    """

    not_hidden = ("project_in", "project_out")

    def __init__(
        self,
        features: int,
        backwards: bool,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        context_width: int,
        pooled_width: int,
        checkpointing: bool,
    ):
        super().__init__()
        self.checkpointing = checkpointing
        self.backwards = backwards
        self.project_in = nn.Linear(features, width)
        self.pooled_embedding = nn.Linear(pooled_width, width)
        self.layers = nn.ModuleList(CausalBlock(width, heads, hidden, context_width) for _ in range(depth))
        self.norm_out = RMSNorm(width)
        self.project_out = zero_(nn.Linear(width, 2 * features))

    def forward(
        self, x: Tensor, positions: Tensor, angles: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """x (B, N, D), positions (N, C) and angles (N, C / heads / 2) of its places -> z (B, N, D), log|det| (B,)."""
        x, positions, angles = self._turn(x, 1), self._turn(positions, 0), self._turn(angles, 0)
        before = F.pad(x, (0, 0, 1, -1))
        shift, log_scale = self._affine(before, positions, angles, conditioning).chunk(2, dim=-1)
        z = (x - shift) * torch.exp(-log_scale)
        return self._turn(z, 1), -log_scale.sum((1, 2))

    def inverse(
        self, z: Tensor, positions: Tensor, angles: Tensor, conditioning: Conditioning, guide: Guide | None
    ) -> Tensor:
        """z (B, N, D) -> x (B, N, D), patch by patch; arguments as in `forward`, and see `TarFlow.inverse_steps`."""
        z, positions, angles = self._turn(z, 1), self._turn(positions, 0), self._turn(angles, 0)
        num_patches, num_words = z.shape[1], conditioning.tokens.shape[1]
        copies = len(conditioning.pooled) // len(z)
        caches = [(Cache(num_patches), Cache(num_words)) for _ in self.layers]
        made = [torch.zeros_like(z[:, :1])]
        for i in range(num_patches):
            here = slice(i, i + 1)
            before = made[-1].repeat(copies, 1, 1)
            parameters = self._affine(before, positions[here], angles[here], conditioning, caches)
            if guide is not None:
                parameters = guide(parameters)
            shift, log_scale = parameters.chunk(2, dim=-1)
            made.append(z[:, here] * torch.exp(log_scale) + shift)
        return self._turn(torch.cat(made[1:], dim=1), 1)

    def _affine(
        self,
        before: Tensor,
        positions: Tensor,
        angles: Tensor,
        conditioning: Conditioning,
        caches: list[tuple[Cache, Cache]] | None = None,
    ) -> Tensor:
        """μ and α (B, N, 2D) of patches from those before each (B, N, D); with caches, of the next N.

        They are as exact as the pictures, whatever the autocast: what they decide is smaller than a rounded number.
        """
        h = self.project_in(before) + self.pooled_embedding(conditioning.pooled)[:, None]
        h = h + positions.to(h.dtype)
        recomputes = caches is None and (self.checkpointing or not self.training)
        for k, layer in enumerate(self.layers):
            own = None if caches is None else caches[k]
            inputs = h, conditioning.tokens, conditioning.mask, angles, own
            h = checkpoint(layer, *inputs, use_reentrant=False) if recomputes else layer(*inputs)
        h = self.norm_out(h).to(before.dtype)
        with without_autocast(h):
            return self.project_out(h)

    def _turn(self, x: Tensor, dim: int) -> Tensor:
        return x.flip(dim) if self.backwards else x


class TarFlow(nn.Module):
    """x (B, C, H, W), conditioning -> z (B, C, H, W), which training makes standard normal, and log|det ∂z/∂x| (B,).

    Pictures are of any size that the patch divides. Every other block begins with the last patch.

    Args:
        in_channels: channels of x and z.
        patch: height and width of what becomes one token.
        width: features of a token; 4 must divide those of a head.
        num_blocks: flows one after the other.
        depth: transformer layers of each.
        heads: attention heads.
        expansion: hidden width of the feed-forward layers, in widths, rounded.
        context_width: features of the conditioning's tokens, which every layer attends to.
        pooled_width: features of the conditioning's pooled vector, which is added to every patch.
        checkpointing: recompute layers in the backward pass instead of keeping their activations. In evaluation, where
            whole chunks are differentiated to take the noise away, they are always recomputed.
    """

    def __init__(
        self,
        in_channels: int,
        patch: int,
        width: int,
        num_blocks: int,
        depth: int,
        heads: int,
        expansion: float,
        context_width: int,
        pooled_width: int,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.patch = patch
        self.width = width
        self.head_width = features_of_heads(width, heads, 4)
        hidden = round(expansion * width)
        self.blocks = nn.ModuleList(
            FlowBlock(
                in_channels * patch**2,
                k % 2 == 1,
                width,
                depth,
                heads,
                hidden,
                context_width,
                pooled_width,
                checkpointing,
            )
            for k in range(num_blocks)
        )

    def forward(self, x: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        tokens, grid, places = self._patches(x)
        logdet = x.new_zeros(len(x))
        for block in self.blocks:
            tokens, of_block = block(tokens, *places, conditioning)
            logdet = logdet + of_block
        return self._picture(tokens, grid), logdet

    def inverse(self, z: Tensor, conditioning: Conditioning) -> Tensor:
        """The x (B, C, H, W) of a z (B, C, H, W), under the same conditioning."""
        *_, x = self.inverse_steps(z, conditioning)
        return x

    def inverse_steps(self, z: Tensor, conditioning: Conditioning, guide: Guide | None = None) -> Iterator[Tensor]:
        """What each block makes of the last one's, (B, C, H, W), from z to x.

        Each patch goes through each block once: what attention needs of the patches before it is kept.

        Args:
            z: (B, C, H, W).
            conditioning: of B samples; with a guide, of k · B, the first B, the next B, ….
            guide: makes one shift and log-scale of the k.
        """
        tokens, grid, places = self._patches(z)
        for block in reversed(self.blocks):
            assert isinstance(block, FlowBlock)
            tokens = block.inverse(tokens, *places, conditioning, guide)
            yield self._picture(tokens, grid)

    def _patches(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple[Tensor, Tensor]]:
        """Patches (B, N, D), their rows and columns, their positions (N, C) and angles (N, C / heads / 2)."""
        if x.shape[2] % self.patch or x.shape[3] % self.patch:
            raise ValueError(f"a patch of {self.patch} does not divide a height and width of {tuple(x.shape[2:])}")
        patches = F.pixel_unshuffle(x, self.patch)
        height, width = patches.shape[2:]
        positions = sinusoidal_positions(height, width, self.width, x.device)
        angles = axial_angles(height, width, self.head_width, x.device)
        return patches.flatten(2).transpose(1, 2), (height, width), (positions, angles)

    def _picture(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), self.patch)
