import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from carrara.errors import UserError
from carrara.metric.frechet import FrechetDistance, frechet_distance, frechet_distance_from_features


def features(n: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated features with a mean far from zero."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mixing / dim**0.5 + 3 + shift


def score(real: Tensor, generated: Tensor, num_images: int, batch: int = 16) -> float:
    metric = FrechetDistance(real.shape[1], num_images)
    for x in real.split(batch):
        metric.update(x, real=True)
    for x in generated.split(batch):
        metric.update(x, real=False)
    return float(metric.compute())


def test_agrees_with_the_matrix_square_root_of_scipy():
    a, b = features(200, 24, 1), features(150, 24, 2, shift=0.3) * 1.4
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    mean_a, mean_b = a.mean(0), b.mean(0)
    expected = float((mean_a - mean_b).square().sum()) + np.trace(cov_a + cov_b - 2 * root)
    distance = frechet_distance(mean_a, torch.tensor(cov_a), mean_b, torch.tensor(cov_b))
    assert distance.dtype == torch.float64
    assert float(distance) == pytest.approx(expected, rel=1e-9)
    assert float(frechet_distance_from_features(a, b)) == pytest.approx(expected, rel=1e-9)
    assert score(a, b, num_images=150) == pytest.approx(expected, rel=1e-9)
    assert score(a, b, num_images=24) == pytest.approx(expected, rel=1e-9)


def test_agrees_with_torchmetrics():
    class Identity(torch.nn.Module):
        num_features = 24

        def forward(self, x: Tensor) -> Tensor:
            return x

    oracle = FrechetInceptionDistance(feature=Identity())
    a, b = features(200, 24, 1), features(150, 24, 2, shift=0.3) * 1.4
    oracle.update(a, real=True)
    oracle.update(b, real=False)
    assert score(a, b, num_images=150) == pytest.approx(float(oracle.compute()), rel=1e-9)


def test_diagonal_gaussians_match_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    mu1, mu2 = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    var1, var2 = torch.rand(2, 16, generator=generator, dtype=torch.float64) * 4
    var1[:5] = 0
    expected = (mu1 - mu2).square().sum() + (var1.sqrt() - var2.sqrt()).square().sum()
    assert frechet_distance(mu1, var1.diag(), mu2, var2.diag()).item() == pytest.approx(expected.item(), rel=1e-7)


@pytest.mark.parametrize("num_images", [10, 1000])
@pytest.mark.parametrize("n", [20, 300])
def test_a_set_is_at_distance_zero_from_itself(n, num_images):
    """Also with fewer images than dimensions, with dead features, and in either form of the states."""
    a = features(n, 100, 3) * 10
    a[:, :30] = 0
    shuffled = a[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    assert abs(score(a, shuffled, num_images)) < 1e-6


def test_fewer_images_than_dimensions_need_the_features():
    """Both forms agree where both apply: what is gathered is no approximation of what is summed."""
    a, b = features(12, 64, 1), features(9, 64, 2, shift=0.5)
    gathered, summed = score(a, b, num_images=9), score(a, b, num_images=100)
    assert gathered == pytest.approx(summed, rel=1e-6)
    root = scipy.linalg.sqrtm(np.cov(a.numpy().T) @ np.cov(b.numpy().T)).real
    expected = float((a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum()) - 2 * np.trace(root)
    assert gathered == pytest.approx(expected, rel=1e-4)  # scipy's own error on singular matrices


@pytest.mark.parametrize("num_images", [10, 1000])
def test_order_and_batches_do_not_matter(num_images):
    a, b = features(50, 32, 1), features(40, 32, 2)
    expected = score(a, b, num_images)
    assert score(a.flip(0), b.flip(0), num_images, batch=7) == pytest.approx(expected, rel=1e-9)


def test_float32_features_are_summed_in_float64():
    a, b = (features(400, 8, seed) + 1000 for seed in (1, 2))
    single = score(a.float(), b.float(), num_images=400)
    assert single == pytest.approx(float(frechet_distance_from_features(a.float(), b.float())), rel=1e-6)


def test_it_is_symmetric_and_counts_the_images():
    a, b = features(50, 8, 1), features(40, 8, 2, shift=1)
    metric = FrechetDistance(8, num_images=40)
    assert metric.num_images == (0, 0)
    metric.update(a, real=True)
    metric.update(b, real=False)
    distance = metric.compute()
    assert distance.shape == ()
    assert distance.dtype == torch.float64
    assert metric.num_images == (50, 40)
    assert float(distance) == pytest.approx(score(b, a, num_images=40), rel=1e-9)
    metric.reset()
    assert metric.num_images == (0, 0)


@pytest.mark.parametrize("num_images", [4, 1000])
def test_too_few_images_are_a_clear_error(num_images):
    metric = FrechetDistance(8, num_images)
    metric.update(features(5, 8, 1), real=True)
    metric.update(features(1, 8, 2), real=False)
    with pytest.raises(UserError, match="not 5 and 1"):
        metric.compute()
