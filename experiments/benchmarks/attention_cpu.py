"""Fused attention against three plain operations on the CPU, forward and backward, in alternation.

`python experiments/benchmarks/attention_cpu.py` prints fused time / plain time; above 1 the plain one is faster.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from roof import describe
from torch import Tensor


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def seconds(attention: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]) -> float:
    start = time.perf_counter()
    for _ in range(5):
        attention(*inputs).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    print(describe())
    for tokens, width in ((16, 64), (64, 32), (64, 64), (128, 64), (256, 32)):
        for dtype in (torch.bfloat16, torch.float32):
            inputs = [torch.randn(64, 4, tokens, width, dtype=dtype, requires_grad=True) for _ in range(3)]
            pairs = [(seconds(F.scaled_dot_product_attention, inputs), seconds(plain, inputs)) for _ in range(6)]
            ratios = sorted(fused / ours for fused, ours in pairs[1:])
            middle = statistics.median(ratios)
            name = str(dtype).removeprefix("torch.")
            spread = f"{middle:.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
            print(f"64 × 4 heads, {tokens:3d} tokens of {width}, {name:8s}: {spread}")


if __name__ == "__main__":
    main()
