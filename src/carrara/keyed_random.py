"""Random numbers that are a pure function of (seed, position in the stream, purpose).

Training draws its times, noise, posterior samples and caption drops from here, so what a sample receives does not
depend on ranks, workers, batch size or on what was drawn before it. The generator is SplitMix64 (Steele, Lea & Flood,
"Fast splittable pseudorandom number generators", OOPSLA 2014), one stream a sample, vectorised over the batch on
whatever device the positions live on.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # the odd constants, as signed 64-bit integers: torch has no uint64 arithmetic
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
SMALLEST = 2.0**-24  # uniforms lie between this and one less this


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (not arithmetic) shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _bits(seed: int, positions: Tensor, purpose: str, count: int) -> Tensor:
    """(B, count) uniformly distributed int64, all 64 bits random."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    key = int.from_bytes(digest[:8], "little", signed=True)
    stream = _mix(_mix(positions.long() * _GOLDEN + key) ^ key)
    counter = torch.arange(1, count + 1, device=positions.device, dtype=torch.int64)
    return _mix(stream[:, None] + counter * _GOLDEN)


def positions_of(keys: Sequence[str]) -> Tensor:
    """(B,) int64 to draw by in place of positions in the stream: hashes of samples' keys, the same at every visit."""
    hashes = [hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8] for key in keys]
    return torch.tensor([int.from_bytes(one, "little", signed=True) for one in hashes], dtype=torch.int64)


def uniform(seed: int, positions: Tensor, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform float32 numbers strictly inside (0, 1).

    Args:
        seed: the run's seed.
        positions: (B,) integers, each sample's place in the stream.
        purpose: what the numbers are for; different purposes are independent.
        shape: of the numbers of one sample.

    Returns:
        (B, *shape) float32 on the positions' device.
    """
    bits = _shift_right(_bits(seed, positions, purpose, math.prod(shape)), 41)  # 23 bits: k + 1/2 is exact in float32
    return ((bits.float() + 0.5) * 2.0**-23).reshape(len(positions), *shape)


def spread(seed: int, positions: Tensor, purpose: str) -> Tensor:
    """(B,) uniform float32 numbers inside (0, 1) of which any run of neighbouring positions fills the interval evenly.

    They are the golden ratio's multiples, modulo 1, from a start that (seed, purpose) decides. A batch's times are
    drawn so: its loss varies less than with independent ones (Kingma et al. 2021, "Variational diffusion models",
    appendix I.1). Arguments as in `uniform`.
    """
    start = _bits(seed, torch.zeros_like(positions[:1]), purpose, 1)[0]
    bits = _shift_right(start + positions.long() * _GOLDEN, 41)
    return (bits.float() + 0.5) * 2.0**-23


def normal(seed: int, positions: Tensor, purpose: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 numbers (B, *shape) by Box–Muller; arguments as in `uniform`."""
    count = math.prod(shape)
    half = (count + 1) // 2
    bits = _shift_right(_bits(seed, positions, purpose, 2 * half), 11)
    u = (bits.float() + 0.5) * 2.0**-53
    radius = (-2.0 * u[:, :half].log()).clamp_min(0).sqrt()
    angle = 2.0 * math.pi * u[:, half:]
    pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return pairs[:, :count].reshape(len(positions), *shape)
