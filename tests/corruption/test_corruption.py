"""Corruptions against the closed forms of their moments and distributions."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from carrara import keyed_random
from carrara.corruption.base import Corruption, as_stored
from carrara.corruption.noise import Gaussian, Poisson, poisson_quantile
from carrara.corruption.text import Text

MAKERS = [lambda seed: Gaussian(0.3, seed), lambda seed: Poisson(20.0, seed), lambda seed: Text(0.25, seed)]
N = 4000


def level(value: float, count: int = N) -> Tensor:
    """`count` pictures of 2 × 2, all of one value."""
    return torch.full((count, 3, 2, 2), value)


def keys(count: int = N) -> list[str]:
    return [f"train-000000.tar/{k}" for k in range(count)]


@pytest.mark.parametrize("value", [-1.0, -0.4, 0.7, 1.0])
@pytest.mark.parametrize("sigma", [0.1, 0.6])
def test_gaussian_noise_has_its_mean_and_deviation(value, sigma):
    noise = (Gaussian(sigma, 0)(level(value), keys(), 0) - value).flatten()
    assert stats.kstest((noise / sigma).numpy(), "norm").pvalue > 0.01
    assert abs(noise.mean().item()) < 4 * sigma / math.sqrt(len(noise))


@pytest.mark.parametrize("value", [-1.0, -0.4, 0.7, 1.0])
@pytest.mark.parametrize("peak", [0.5, 30.0, 500.0])
def test_photons_have_their_mean_and_variance(value, peak):
    noise = (Poisson(peak, 0)(level(value), keys(), 0) - value).double().flatten()
    variance = (1 + value) * 2 / peak
    assert abs(noise.mean().item()) <= 4 * math.sqrt(variance / len(noise)) + 1e-6
    assert noise.var().item() == pytest.approx(variance, rel=0.06, abs=1e-9)


@pytest.mark.parametrize("mean", [0.0, 0.02, 1.0, 30.0, 499.0])
def test_counts_are_the_quantiles_of_the_poisson_distribution(mean):
    u = torch.cat([torch.linspace(0.001, 0.999, 501), torch.tensor([2.0**-24, 1 - 2.0**-24])]).double()
    expected = stats.poisson.ppf(u.numpy(), mean)
    assert torch.equal(poisson_quantile(u, torch.full_like(u, mean)), torch.from_numpy(expected).double())


@pytest.mark.parametrize("share", [0.05, 0.25, 0.45])
@pytest.mark.parametrize("side", [32, 64])
def test_text_covers_its_share(share, side):
    images = torch.full((24, 3, side, side), 2.0)  # no colour is this
    covered = (Text(share, 0)(images, keys(24), 0) != 2.0).any(1).float().mean((1, 2))
    assert (covered >= share).all()
    assert covered.max() < share + 0.2  # the last string
    assert covered.mean() < share + 0.08
    taken = Text(share, 0)(images, keys(24), 0)
    assert taken[taken != 2.0].abs().max() <= 1
    colors = (((taken[taken != 2.0] + 1) * 127.5).round() / 255).double().unique()
    assert len(colors) > 100 and colors.min() < 0.05 and colors.max() > 0.95


def test_text_leaves_the_median_and_covers_all_places_alike():
    image = torch.linspace(-1, 1, 3 * 24 * 24).reshape(1, 3, 24, 24)
    versions = torch.cat([Text(0.25, 0)(image, ["a"], version) for version in range(300)])
    assert torch.equal(versions.median(0).values, image[0])
    assert (versions.mean(0) - image[0]).abs().max() > 0.2  # which is grey: L2 would learn that
    often = (versions != image).any(1).float().mean(0)
    thirds = torch.stack([rows.mean() for row in often.chunk(3) for rows in row.chunk(3, dim=1)])
    assert thirds.std() < 0.05 * thirds.mean() + 0.02


@pytest.mark.parametrize("make", MAKERS, ids=["gaussian", "poisson", "text"])
def test_without_the_excess_noisy_versions_tell_the_distance_from_the_clean_picture(make: Callable[[int], Corruption]):
    """Of answers that are as wrong as one likes: but for a factor and a constant."""
    corruption = make(0)
    clean = torch.linspace(-1, 1, 3 * 24 * 24)[torch.randperm(3 * 24 * 24)].reshape(1, 3, 24, 24)
    noisy = torch.cat([corruption(clean.expand(100, -1, -1, -1), keys(100), version) for version in range(20)])
    answers = [torch.full_like(clean, value) for value in (-1.5, -0.9, -0.3, 0.1, 0.7, 1.2)]
    answers += [clean, 0.5 * clean, -clean]
    told = torch.stack([(corruption.distance(x, noisy) - corruption.excess(x)).mean() for x in answers])
    expected = torch.stack([corruption.distance(x, clean).mean() for x in answers])
    same = (noisy == clean).float().mean().item() if corruption.excess(clean).any() else 1.0
    assert (told - same * expected).std() < 0.005


@pytest.mark.parametrize("make", MAKERS, ids=["gaussian", "poisson", "text"])
def test_a_picture_has_the_same_versions_in_any_batch(make: Callable[[int], Corruption]):
    corruption = make(0)
    images = torch.rand(4, 3, 16, 24) * 2 - 1
    names = ["0.tar/a", "0.tar/b", "1.tar/a", "é"]
    whole = corruption(images, names, 0)
    assert whole.shape == images.shape and whole.dtype == torch.float32
    torch.manual_seed(7)
    assert torch.equal(whole[2:], corruption(images[2:], names[2:], 0))
    positions = keyed_random.positions_of(names)
    assert torch.equal(whole, corruption.corrupt(images, positions, "corruption/0"))
    same = images[:1].expand(4, -1, -1, -1)
    versions = [corruption(same, names, 0), corruption(same, names, 1), make(1)(same, names, 0)]
    for a in versions:  # no two are alike: of other keys, versions and seeds
        for b in versions:
            for i in range(4):
                for j in range(4):
                    assert (a is b and i == j) or not torch.equal(a[i], b[j])


def test_noise_of_two_versions_is_independent():
    a, b = (Gaussian(1.0, 0)(level(0.0), keys(), version).flatten() for version in (0, 1))
    correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
    assert abs(correlation.item()) < 4 / math.sqrt(len(a))


def test_what_is_stored_is_what_a_file_holds():
    images = torch.tensor([-1.7, -1.0, -0.999, 0.0031, 1.0, 4.0])
    assert torch.equal(((as_stored(images) + 1) * 127.5).round(), torch.tensor([0.0, 0, 0, 128, 255, 255]))


def test_cutting_noise_off_moves_the_mean_of_black():
    """Which is why targets are not stored: E max(0, n) = sigma / √(2π)."""
    noisy = as_stored(Gaussian(0.4, 0)(level(-1.0), keys(), 0))
    assert (noisy.mean() + 1).item() == pytest.approx(0.4 / math.sqrt(2 * math.pi), rel=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(0.0, 0), r"corruption\.sigma must be more than 0"),
        (lambda: Poisson(501.0, 0), r"corruption\.peak must be .* at most 500, not 501"),
        (lambda: Text(0.5, 0), r"corruption\.share must be .* at most 0\.45"),
    ],
)
def test_impossible_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
