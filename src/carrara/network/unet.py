"""The noise predictor of latent and pixel diffusion: a U-Net with attention over its own pixels and the text.

Ho et al. 2020 (residual blocks, time embedding), Rombach et al. 2022 (transformer blocks with cross-attention).
With channels [320, 640, 1280, 1280], attention [true, true, true, false] and 8 heads it is Stable Diffusion 1's
(`carrara.published` reads its weights).
"""

import torch
from torch import Tensor, nn

from carrara.network.attention import Attention
from carrara.network.conditioning import Conditioning
from carrara.network.layers import GEGLU, Downsample, ResidualBlock, Upsample, norm_groups, sinusoidal_embedding, zero_


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward, each after a LayerNorm and around a skip."""

    def __init__(self, width: int, heads: int, context_width: int, expansion: int, qk_norm: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads, context_width, qk_norm=qk_norm)
        self.norm3 = nn.LayerNorm(width)
        self.feed_forward = GEGLU(width, expansion)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attention(self.norm1(x))
        x = x + self.cross_attention(self.norm2(x), context, mask)
        return x + self.feed_forward(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map (B, C, H, W).

    With `positions` (H, W) a learned position is added to each pixel before attention; convolutions alone tell
    positions only near the border, so a small network binds "left of" to a place much sooner with them. They start
    about as large as what they are added to, and the branch starts open: a short training has no time to grow them.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        context_width: int,
        depth: int,
        expansion: int,
        qk_norm: bool,
        positions: tuple[int, int] | None,
    ):
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups(channels), channels, eps=1e-6)
        self.project_in = nn.Linear(channels, channels)
        self.positions = (
            None if positions is None else nn.Parameter(0.5 * torch.randn(positions[0] * positions[1], channels))
        )
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_width, expansion, qk_norm) for _ in range(depth)
        )
        self.project_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        h = self.project_in(self.norm(x).flatten(2).transpose(1, 2))
        if self.positions is not None:
            h = h + self.positions.to(h.dtype)  # a float32 sum would make all that follows float32
        for block in self.blocks:
            h = block(h, context, mask)
        return x + self.project_out(h).transpose(1, 2).unflatten(2, x.shape[2:])


class Stage(nn.Module):
    """A residual block and, where the level has attention, a spatial transformer."""

    def __init__(self, residual: ResidualBlock, transformer: SpatialTransformer | None):
        super().__init__()
        self.residual = residual
        self.transformer = transformer

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        x = self.residual(x, embedding)
        return x if self.transformer is None else self.transformer(x, context, mask)


class UNet(nn.Module):
    """x (B, C, H, W), time (B,), conditioning -> (B, C, H, W).

    Args:
        in_channels: channels of x and of the output.
        resolution: height and width of x in training; read only with `learned_positions`.
        channels: width of each level, finest first; each level halves the resolution of the one before.
        attention: whether each level has transformers.
        num_blocks: residual blocks a level on the way down (one more on the way up).
        depth: transformer blocks in each spatial transformer.
        heads: attention heads, of all levels or of each (Stable Diffusion 2: [5, 10, 20, 20], heads of one size).
        expansion: hidden width of the feed-forward layers, in widths of the level (Stable Diffusion: 4).
        context_width: features of the conditioning's tokens.
        pooled_width: features of the conditioning's pooled vector, added to the time embedding; 0 ignores it.
        picture_channels: channels of the conditioning's picture, which is put beside x; 0 ignores it.
        qk_norm: normalise the queries and keys of the attention (Stable Diffusion does not).
        learned_positions: add a learned position to each pixel before attention. The resolution is then fixed.
        checkpointing: recompute stages in the backward pass instead of keeping their activations.
    """

    def __init__(
        self,
        in_channels: int,
        resolution: int,
        channels: list[int],
        attention: list[bool],
        num_blocks: int,
        depth: int,
        heads: int | list[int],
        expansion: int,
        context_width: int,
        pooled_width: int,
        qk_norm: bool,
        learned_positions: bool,
        picture_channels: int = 0,
        checkpointing: bool = False,
    ):
        super().__init__()
        if len(channels) != len(attention):
            raise ValueError(f"network.channels has {len(channels)} levels, network.attention {len(attention)}")
        heads = [heads] * len(channels) if isinstance(heads, int) else heads
        if len(heads) != len(channels):
            raise ValueError(f"network.heads={heads} is of {len(heads)} levels, network.channels has {len(channels)}")
        if resolution % 2 ** (len(channels) - 1):
            raise ValueError(f"a resolution of {resolution} cannot be halved {len(channels) - 1} times")
        self.in_channels = in_channels
        self.context_width = context_width
        self.checkpointing = checkpointing
        width = 4 * channels[0]
        self.time_embedding = nn.Sequential(nn.Linear(channels[0], width), nn.SiLU(), nn.Linear(width, width))
        self.pooled_embedding = nn.Linear(pooled_width, width) if pooled_width else None
        self.picture_embedding = (
            nn.Sequential(nn.Linear(channels[0], width), nn.SiLU(), nn.Linear(width, width))
            if picture_channels
            else None
        )

        def stage(level: int, c_in: int, c_out: int, attend: bool) -> Stage:
            size = resolution // 2**level
            positions = (size, size) if learned_positions else None
            residual = ResidualBlock(c_in, c_out, width)
            if not attend:
                return Stage(residual, None)
            return Stage(
                residual, SpatialTransformer(c_out, heads[level], context_width, depth, expansion, qk_norm, positions)
            )

        self.conv_in = nn.Conv2d(in_channels + picture_channels, channels[0], 3, padding=1)
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        current, skips = channels[0], [channels[0]]
        last = len(channels) - 1
        for level, c in enumerate(channels):
            stages = nn.ModuleList()
            for _ in range(num_blocks):
                stages.append(stage(level, current, c, attention[level]))
                current = c
                skips.append(c)
            self.down.append(stages)
            if level < last:
                self.downsample.append(Downsample(c))
                skips.append(c)
        self.middle = stage(last, current, current, True)
        self.middle_residual = ResidualBlock(current, current, width)
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(channels))):
            stages = nn.ModuleList()
            for _ in range(num_blocks + 1):
                stages.append(stage(level, current + skips.pop(), channels[level], attention[level]))
                current = channels[level]
            self.up.append(stages)
            if level > 0:
                self.upsample.append(Upsample(current))
        self.norm_out = nn.GroupNorm(norm_groups(current), current)
        self.conv_out = zero_(nn.Conv2d(current, in_channels, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        embedding = self.time_embedding(self._features(time))
        if self.pooled_embedding is not None:
            embedding = embedding + self.pooled_embedding(conditioning.pooled)
        if self.picture_embedding is not None:
            if conditioning.picture is None or conditioning.picture_noise is None:
                raise ValueError("network.picture_channels: this conditioning has no picture")
            embedding = embedding + self.picture_embedding(self._features(1000 * conditioning.picture_noise))
            x = torch.cat([x, conditioning.picture.to(x)], dim=1)
        text = conditioning.tokens, conditioning.mask
        x = self.conv_in(x)
        skips = [x]
        for level, stages in enumerate(self.down):
            assert isinstance(stages, nn.ModuleList)
            for stage in stages:
                x = self._run(stage, x, embedding, *text)
                skips.append(x)
            if level < len(self.downsample):
                x = self.downsample[level](x)
                skips.append(x)
        x = self._run(self.middle, x, embedding, *text)
        x = self.middle_residual(x, embedding)
        for level, stages in enumerate(self.up):
            assert isinstance(stages, nn.ModuleList)
            for stage in stages:
                x = self._run(stage, torch.cat([x, skips.pop()], dim=1), embedding, *text)
            if level < len(self.upsample):
                x = self.upsample[level](x)
        return self.conv_out(nn.functional.silu(self.norm_out(x)))

    def _features(self, time: Tensor) -> Tensor:
        """Of times (B,) on the scale of 0…1000."""
        return sinusoidal_embedding(time, self.conv_in.out_channels).to(self.conv_in.weight.dtype)

    def _run(self, stage: nn.Module, *inputs: Tensor) -> Tensor:
        if self.checkpointing and self.training:
            return torch.utils.checkpoint.checkpoint(stage, *inputs, use_reentrant=False)
        return stage(*inputs)
