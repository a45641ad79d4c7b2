"""Noise that is independent from pixel to pixel and does not move the mean."""

import torch
from torch import Tensor

from carrara import keyed_random
from carrara.corruption.base import Corruption, check_range

_MOST_PHOTONS = 500.0  # exp(-peak) and the sums of probabilities stay exact in float64


class Gaussian(Corruption):
    """x + sigma · eps (Lehtinen et al. 2018, section 3.1).

    Args:
        sigma: standard deviation, in units of pictures in [−1, 1]; 25 of 255 levels are 0.196.
        seed: see `Corruption`.
    """

    def __init__(self, sigma: float, seed: int):
        super().__init__(seed)
        check_range("sigma", sigma, 0, 10)
        self.sigma = sigma

    def corrupt(self, images: Tensor, positions: Tensor, purpose: str) -> Tensor:
        return images + self.sigma * keyed_random.normal(self.seed, positions, purpose, tuple(images.shape[1:]))


class Poisson(Corruption):
    """Counts of photons, of which white sends `peak` on average (Lehtinen et al. 2018, section 3.2).

    The variance of a value grows with it: (1 + x) · 2 / peak.

    Args:
        peak: the mean count of a value of 1; black sends none.
        seed: see `Corruption`.
    """

    def __init__(self, peak: float, seed: int):
        super().__init__(seed)
        check_range("peak", peak, 0, _MOST_PHOTONS)
        self.peak = peak

    def corrupt(self, images: Tensor, positions: Tensor, purpose: str) -> Tensor:
        u = keyed_random.uniform(self.seed, positions, purpose, tuple(images.shape[1:]))
        count = poisson_quantile(u, (images + 1) * (self.peak / 2))
        return (2 / self.peak * count - 1).to(images.dtype)


def poisson_quantile(u: Tensor, mean: Tensor) -> Tensor:
    """The least k with P(count ≤ k) ≥ u, float64: uniforms to Poisson counts of these means, at most 500."""
    mean = mean.double()
    probability = torch.exp(-mean)
    below, count = probability.clone(), torch.zeros_like(mean)
    largest = float(mean.max()) if mean.numel() else 0.0
    for k in range(1, int(largest + 9 * largest**0.5) + 20):  # beyond the last quantile of a uniform of 23 bits
        count += u > below
        probability = probability * mean / k
        below += probability
    return count
