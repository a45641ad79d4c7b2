import math

import pytest
import torch
from torch.distributions import Categorical, Laplace, MultivariateNormal, Normal, kl_divergence

from carrara.divergence import kl_diagonal, kl_gaussian, kl_monte_carlo, kl_to_standard_normal, kl_to_uniform


def random_gaussian(seed: int, dim: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(dim, generator=generator, dtype=torch.float64), root @ root.T + torch.eye(dim)


def test_full_covariances_agree_with_torch():
    p, q = random_gaussian(1), random_gaussian(2)
    expected = kl_divergence(MultivariateNormal(*p), MultivariateNormal(*q))
    assert kl_gaussian(*p, *q).item() == pytest.approx(expected.item(), rel=1e-10)


def test_diagonal_agrees_with_full_and_with_torch():
    generator = torch.Generator().manual_seed(3)
    mean1, logvar1, mean2, logvar2 = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    full = kl_gaussian(mean1, logvar1.exp().diag(), mean2, logvar2.exp().diag())
    p, q = Normal(mean1, (logvar1 / 2).exp()), Normal(mean2, (logvar2 / 2).exp())
    diagonal = kl_diagonal(mean1, logvar1, mean2, logvar2)
    assert diagonal.item() == pytest.approx(full.item(), rel=1e-10)
    assert diagonal.item() == pytest.approx(kl_divergence(p, q).sum().item(), rel=1e-10)


def test_it_is_never_negative_asymmetric_and_zero_only_if_equal():
    for seed in range(10):
        p, q = random_gaussian(seed), random_gaussian(seed + 100)
        assert 0 <= kl_gaussian(*p, *p) < 1e-20
        assert kl_gaussian(*p, *q) > 0
        assert kl_gaussian(*p, *q).item() != pytest.approx(kl_gaussian(*q, *p).item(), rel=1e-3)
        for step in (1e-3, 1e-6, 1e-9):
            assert kl_gaussian(p[0] + step, p[1], *p) > 0
            assert kl_gaussian(p[0], p[1] * (1 + step), *p) >= 0
    tiny = torch.linspace(-1e-4, 1e-4, 101)[:, None]
    assert (kl_to_standard_normal(torch.zeros_like(tiny), tiny) >= 0).all()
    assert kl_gaussian(p[0], p[1] * 1.01, *p) > 0


def test_monte_carlo_agrees_with_the_closed_form_to_one_percent():
    generator = torch.Generator().manual_seed(0)
    (mean1, cov1), (mean2, cov2) = random_gaussian(1), random_gaussian(2)
    p, q = MultivariateNormal(mean1, cov1), MultivariateNormal(mean2, cov2)
    samples = mean1 + torch.randn(200_000, 5, generator=generator, dtype=torch.float64) @ p.scale_tril.T
    estimate, error = kl_monte_carlo(p.log_prob, q.log_prob, samples)
    exact = kl_gaussian(mean1, cov1, mean2, cov2)
    assert estimate.item() == pytest.approx(exact.item(), rel=0.01)
    assert abs(estimate - exact) < 4 * error
    assert error < 0.01 * exact


def test_monte_carlo_where_the_second_distribution_has_the_heavier_tails():
    samples = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = Normal(0.0, 1.0), Laplace(0.0, 1.0)
    exact = torch.log(torch.tensor(2.0)) + (2 / torch.pi) ** 0.5 - 0.5 * (1 + torch.log(torch.tensor(2 * torch.pi)))
    estimate, _ = kl_monte_carlo(lambda x: p.log_prob(x), lambda x: q.log_prob(x), samples)
    assert estimate.item() == pytest.approx(exact.item(), rel=0.02)


def test_the_vae_term_is_per_sample_and_differentiable():
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 3, 4, 2, 2, generator=generator)
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).flatten(1).sum(1)
    assert torch.allclose(kl_to_standard_normal(mean, logvar), expected, rtol=1e-5)
    mean.requires_grad_()
    kl_to_standard_normal(mean, logvar).sum().backward()
    assert mean.grad is not None
    assert torch.allclose(mean.grad, mean.detach())
    assert kl_to_standard_normal(mean.bfloat16(), logvar.bfloat16()).dtype == torch.float32


def test_a_singular_covariance_is_refused():
    mean, cov = random_gaussian(1)
    with pytest.raises(torch.linalg.LinAlgError):
        kl_gaussian(mean, cov, mean, torch.zeros(5, 5))


def test_kl_to_the_uniform_distribution():
    logits = torch.randn(2, 5, 3, 3) * 3
    wanted = kl_divergence(Categorical(logits=logits.movedim(1, -1)), Categorical(logits=torch.zeros(5)))
    torch.testing.assert_close(kl_to_uniform(logits, 1), wanted)
    sure = torch.tensor([0.0, 0.0, 1e4, 0.0, 0.0])
    assert kl_to_uniform(sure, 0).item() == pytest.approx(math.log(5))
    assert kl_to_uniform(torch.full((5,), 3.0), 0).item() == pytest.approx(0, abs=1e-6)
