"""Fréchet distance between two sets of features (FID when the features are Inception's)."""

from typing import NamedTuple

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.metric.float64_metric import Float64Metric


class Gaussian(NamedTuple):
    """N(mean, root rootᵀ) with mean (D,) and root (D, k), both float64; k may be smaller than D."""

    mean: Tensor
    root: Tensor

    @classmethod
    def from_moments(cls, mean: Tensor, cov: Tensor) -> "Gaussian":
        """`mean` (D,), `cov` (D, D) symmetric positive semi-definite."""
        values, vectors = torch.linalg.eigh(cov.double())
        return cls(mean.double(), vectors * values.clamp_min(0).sqrt())

    @classmethod
    def from_features(cls, features: Tensor) -> "Gaussian":
        """`features` (n, D), n >= 2. Centred and scaled they are a root of their covariance."""
        features = features.double()
        mean = features.mean(dim=0)
        return cls(mean, (features - mean).T / (len(features) - 1) ** 0.5)


def gaussian_distance(a: Gaussian, b: Gaussian) -> Tensor:
    """|mean_a − mean_b|² + tr(A + B − 2 (A^½ B A^½)^½), a float64 scalar. Heusel et al. 2017, eq. 6.

    The trace of that square root is the nuclear norm of root_aᵀ root_b (Mathiasen & Hvilshøj 2020). Taking
    singular values there, instead of eigenvalues of A^½ B A^½, keeps the distance of a set to itself at
    rounding error also where covariances are singular: fewer images than dimensions, dead features.
    """
    overlap = torch.linalg.svdvals(a.root.T @ b.root).sum()
    return (a.mean - b.mean).square().sum() + a.root.square().sum() + b.root.square().sum() - 2 * overlap


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> Tensor:
    """Fréchet distance of N(mu1, cov1) and N(mu2, cov2); mu (D,), cov (D, D); float64 scalar."""
    return gaussian_distance(Gaussian.from_moments(mu1, cov1), Gaussian.from_moments(mu2, cov2))


def frechet_distance_from_features(real: Tensor, generated: Tensor) -> Tensor:
    """Fréchet distance of features (n, D) and (m, D), n and m >= 2, exact also below D; float64 scalar."""
    return gaussian_distance(Gaussian.from_features(real), Gaussian.from_features(generated))


class FrechetDistance(Float64Metric):
    """Fréchet distance of real and generated images in the features of one extractor. 0 is best.

    With more images than dimensions the states are sums (x, x xᵀ, n); with fewer, the features themselves,
    which are then smaller than x xᵀ and exact. Either is reduced over ranks before the distance is taken.

    feature_dim: D. num_images: how many real or generated images are expected, the smaller of the two.
    """

    higher_is_better: bool | None = False

    def __init__(self, feature_dim: int, num_images: int) -> None:
        super().__init__()
        self.gathers = num_images <= feature_dim
        self._num_images = (0, 0)
        for side in ("real", "generated"):
            if self.gathers:
                self.add_samples(f"{side}_features", feature_dim)
            else:
                self.add_sum(f"{side}_sum", feature_dim)
                self.add_sum(f"{side}_outer", feature_dim, feature_dim)
                self.add_sum(f"{side}_count")

    @property
    def num_images(self) -> tuple[int, int]:
        """Real and generated images of all ranks that the last `compute` saw; (0, 0) before."""
        return self._num_images

    def update(self, features: Tensor, real: bool) -> None:
        """Add features (B, D), of any float type, of real or of generated images."""
        side = "real" if real else "generated"
        features = features.double()
        if self.gathers:
            getattr(self, f"{side}_features").append(features)
            return
        for name, value in (
            ("sum", features.sum(dim=0)),
            ("outer", features.T @ features),
            ("count", torch.tensor(float(len(features)), dtype=torch.float64, device=features.device)),
        ):
            setattr(self, f"{side}_{name}", getattr(self, f"{side}_{name}") + value)

    def compute(self) -> Tensor:
        """The distance, a float64 scalar. Raises UserError with fewer than two images on a side."""
        self._num_images = (self._count("real"), self._count("generated"))
        if min(self._num_images) < 2:
            raise UserError(
                f"a Fréchet distance needs at least 2 real and 2 generated images, not "
                f"{self._num_images[0]} and {self._num_images[1]}: raise size.evaluation.num_images or data.val_samples"
            )
        return gaussian_distance(self._gaussian("real"), self._gaussian("generated")).to(self.device)

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        self._num_images = (0, 0)

    def _count(self, side: str) -> int:
        return len(self.samples(f"{side}_features")) if self.gathers else int(getattr(self, f"{side}_count"))

    def _gaussian(self, side: str) -> Gaussian:
        # On the CPU: the same LAPACK decompositions under any accelerator, and D is a few thousand at most.
        if self.gathers:
            return Gaussian.from_features(self.samples(f"{side}_features").cpu())
        count = self._count(side)
        mean = getattr(self, f"{side}_sum").cpu() / count
        outer = getattr(self, f"{side}_outer").cpu()
        return Gaussian.from_moments(mean, (outer - count * torch.outer(mean, mean)) / (count - 1))
