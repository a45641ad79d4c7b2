"""Building blocks shared by the networks, but for attention."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which products are of the precision of their factors, on the device of x."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)  # "meta" has none to disable


@contextmanager
def exact(x: Tensor) -> Iterator[None]:
    """A context in which float32 products are not shortened to bfloat16 or TF32, on the device of x."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with without_autocast(x):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def zero_(module: nn.Module) -> nn.Module:
    """Zero a layer's parameters, so that the residual branch it ends starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def sinusoidal_embedding(time: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Transformer position features of a real number (Vaswani et al. 2017, section 3.5), cosines first.

    Args:
        time: (B,) what the network receives as c_noise(t), on the scale of 0…1000.
        width: even number of features.

    Returns:
        (B, width) float32.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, device=time.device, dtype=torch.float32))
    angles = time.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def norm_groups(channels: int) -> int:
    """Number of GroupNorm groups: 32 as in Stable Diffusion, fewer where the width does not divide.

    At least two channels make a group: a norm of single ones would take out the time embedding, which is added
    before it and is the same at every pixel of a channel.
    """
    return 1 if channels % 2 else math.gcd(32, channels // 2)


class RMSNorm(nn.RMSNorm):
    """x / √mean(x²) over the last dimension (Zhang & Sennrich 2019, eq. 4), in x's dtype.

    The mean is in float32, or in float64 if x is.

    Under autocast on a GPU torch's own answers in float32, which would make all that follows float32. On the CPU it is
    several passes over float32 copies: a step of a small transformer in bfloat16 takes a third longer (torch 2.13).
    """

    eps: float

    def __init__(self, width: int, elementwise_affine: bool = True):
        super().__init__(width, eps=1e-6, elementwise_affine=elementwise_affine)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        if x.device.type != "cpu":
            return super().forward(x.to(dtype)).to(x.dtype)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        y = x * (length.square() / x.shape[-1] + self.eps).rsqrt().to(x.dtype)
        return y if self.weight is None else y * self.weight.to(x.dtype)


class GEGLU(nn.Module):
    """Feed-forward layer with a gated GELU (Shazeer, "GLU variants improve transformer", 2020, eq. 5)."""

    def __init__(self, width: int, expansion: int):
        super().__init__()
        self.up = nn.Linear(width, 2 * expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        # the weights are cut, not the answer: halves of a wide tensor lie apart, which makes all that follows slow
        halves = zip(self.up.weight.chunk(2), self.up.bias.chunk(2), strict=True)
        value, gate = (F.linear(x, weight, bias) for weight, bias in halves)
        return self.down(value * F.gelu(gate))


class SwiGLU(nn.Module):
    """Feed-forward layer with a gated SiLU and no biases (Shazeer 2020, eq. 6).

    Args:
        width: of the input and the output.
        hidden: between the two; 8/3 widths make it as large as a layer of 4 widths without a gate.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3×3 convolution, twice, around a skip (He et al. 2016; DDPM's variant with a time embedding).

    Args:
        channels: of the input.
        out_channels: of the output.
        embedding_width: features of the embedding added between the convolutions; None for a block without one.
        eps: of the norms (Stable Diffusion: 1e-5 in the U-Net, 1e-6 in the auto-encoder).
    """

    def __init__(self, channels: int, out_channels: int, embedding_width: int | None = None, eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups(channels), channels, eps=eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.embed = None if embedding_width is None else nn.Linear(embedding_width, out_channels)
        self.norm2 = nn.GroupNorm(norm_groups(out_channels), out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.embed is not None and embedding is not None:
            h = h + self.embed(F.silu(embedding))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Downsample(nn.Module):
    """Halve height and width by a 3×3 convolution; `padding` (left, right, top, bottom) as in published weights."""

    def __init__(self, channels: int, padding: tuple[int, int, int, int] = (1, 1, 1, 1)):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a 3×3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
