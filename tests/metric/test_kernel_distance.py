import pytest
import torch
from torch import Tensor
from torchmetrics.image.kid import KernelInceptionDistance

from carrara.errors import UserError
from carrara.metric.kernel_distance import KernelDistance, kernel_distance


def features(n: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def filled(real: Tensor, generated: Tensor, order: Tensor | None = None, subset_size: int = 1000) -> KernelDistance:
    metric = KernelDistance(16, subset_size, num_subsets=30)
    order = torch.arange(len(real)) if order is None else order
    for part in order.split(11):
        metric.update(real[part], part, real=True)
    metric.update(generated, torch.arange(len(generated)), real=False)
    return metric


def test_is_the_mean_over_pairs_written_out():
    x, y = features(7, 1), features(5, 2, shift=0.5)
    pairs = [[(float(a @ b) / 16 + 1) ** 3 for b in (*x, *y)] for a in (*x, *y)]
    xx = sum(pairs[i][j] for i in range(7) for j in range(7) if i != j) / 42
    yy = sum(pairs[i][j] for i in range(7, 12) for j in range(7, 12) if i != j) / 20
    xy = sum(pairs[i][j] for i in range(7) for j in range(7, 12)) / 35
    assert float(kernel_distance(x, y)) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)


def test_agrees_with_torchmetrics():
    class Identity(torch.nn.Module):
        num_features = 16

        def forward(self, x: Tensor) -> Tensor:
            return x

    real, generated = features(60, 1), features(60, 2, shift=0.4)
    oracle = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=60)
    oracle.update(real, real=True)
    oracle.update(generated, real=False)
    assert float(filled(real, generated).compute()) == pytest.approx(float(oracle.compute()[0]), rel=1e-6)


def test_is_unbiased_where_the_two_sets_are_alike():
    draws = torch.stack([kernel_distance(features(20, 2 * i), features(20, 2 * i + 1)) for i in range(400)])
    error = draws.std() / 20
    assert abs(draws.mean()) < 3 * error
    assert kernel_distance(features(20, 1), features(20, 2, shift=1)) > 100 * error


@pytest.mark.parametrize("subset_size", [1000, 25])
def test_the_order_of_arrival_changes_no_bit(subset_size):
    real, generated = features(60, 1), features(50, 2, shift=0.4)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(5))
    shuffled = filled(real, generated, order, subset_size).compute()
    assert shuffled.item() == filled(real, generated, None, subset_size).compute().item()


def test_subsets_estimate_the_same_distance():
    real, generated = features(300, 1), features(260, 2, shift=0.4)
    full, subsets = filled(real, generated).compute(), filled(real, generated, subset_size=100).compute()
    assert subsets != full
    assert float(subsets) == pytest.approx(float(full), rel=0.1)


def test_counts_and_errors():
    metric = filled(features(6, 1), features(5, 2))
    metric.compute()
    assert metric.num_images == (6, 5)
    with pytest.raises(UserError, match="not 6 and 1"):
        filled(features(6, 1), features(1, 2)).compute()
    metric.update(features(1, 1), torch.tensor([3]), real=True)
    with pytest.raises(ValueError, match="sample 3 was counted twice"):
        metric.compute()
