"""The machine's matrix-multiplication rate: what every other figure is seen against."""

import time

import torch


def roof(dtype: torch.dtype, size: int = 1536, repeats: int = 8) -> float:
    """FLOP/s of square products, the best of three rounds."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        best = min(best, (time.perf_counter() - start) / repeats)
    return 2 * size**3 / best


def describe() -> str:
    """One line: threads and rates."""
    rates = {str(dtype).removeprefix("torch."): roof(dtype) for dtype in (torch.float32, torch.bfloat16)}
    listed = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items())
    return f"matmul roof with {torch.get_num_threads()} threads: {listed}"


if __name__ == "__main__":
    print(describe())
