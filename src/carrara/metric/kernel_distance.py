"""Kernel distance between two sets of features (KID when the features are Inception's)."""

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.metric.float64_metric import Float64Metric, sort_by_index


def kernel_distance(real: Tensor, generated: Tensor) -> Tensor:
    """Unbiased squared MMD (Gretton et al. 2012, eq. 3), kernel (x·y / D + 1)³ (Bińkowski et al. 2018).

    real (n, D), generated (m, D), n and m >= 2. A float64 scalar, by chance below 0 when the sets are alike.
    """
    x, y = real.double(), generated.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_pairs(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    return mean_of_pairs(x) + mean_of_pairs(y) - 2 * kernel(x, y).mean()


class KernelDistance(Float64Metric):
    """Kernel distance of real and generated images: unbiased, so readable at few images, where FID is not.

    Up to `subset_size` images on each side it is the estimator over all pairs; above, the mean over
    `num_subsets` subsets of `subset_size` images drawn without replacement by a generator seeded with `seed`
    (the paper's way). Features are put in the order of their sample index first: the score is the same bits
    for any number of ranks.
    """

    higher_is_better: bool | None = False

    def __init__(self, feature_dim: int, subset_size: int = 1000, num_subsets: int = 100, seed: int = 0) -> None:
        super().__init__()
        self.subset_size, self.num_subsets, self.seed = subset_size, num_subsets, seed
        self._num_images = (0, 0)
        for side in ("real", "generated"):
            self.add_samples(f"{side}_features", feature_dim)
            self.add_samples(f"{side}_index", dtype=torch.int64)

    @property
    def num_images(self) -> tuple[int, int]:
        """Real and generated images of all ranks that the last `compute` saw; (0, 0) before."""
        return self._num_images

    def update(self, features: Tensor, index: Tensor, real: bool) -> None:
        """Add features (B, D) of samples `index` (B,) int64, unique among the real or the generated."""
        side = "real" if real else "generated"
        getattr(self, f"{side}_features").append(features.double())
        getattr(self, f"{side}_index").append(index.to(features.device, torch.int64))

    def compute(self) -> Tensor:
        """The distance, a float64 scalar. Raises UserError with fewer than two images on a side."""
        real, generated = self._sorted("real"), self._sorted("generated")
        self._num_images = (len(real), len(generated))
        if min(self._num_images) < 2:
            raise UserError(
                f"a kernel distance needs at least 2 real and 2 generated images, not "
                f"{self._num_images[0]} and {self._num_images[1]}: raise size.evaluation.num_images or data.val_samples"
            )
        if max(self._num_images) <= self.subset_size:
            return kernel_distance(real, generated)
        generator = torch.Generator().manual_seed(self.seed)

        def subset(features: Tensor) -> Tensor:
            chosen = torch.randperm(len(features), generator=generator)[: self.subset_size]
            return features[chosen.to(features.device)]

        distances = [kernel_distance(subset(real), subset(generated)) for _ in range(self.num_subsets)]
        return torch.stack(distances).mean()

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        self._num_images = (0, 0)

    def _sorted(self, side: str) -> Tensor:
        return sort_by_index(self.samples(f"{side}_index"), self.samples(f"{side}_features"))[0]
