"""On N(0.5, 0.5^2), whose denoiser and entropy are known."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from carrara.diffusion.likelihood import (
    discretized_gaussian,
    gaussian,
    ode_log_likelihood,
    ode_times,
    variational_bound,
)
from carrara.diffusion.schedule import Flow, NoiseSchedule
from carrara.diffusion.schedule_table import Linear
from tests.diffusion import oracle
from tests.diffusion.oracle import MEAN, SCHEDULES, STD, exact

ENTROPY = 0.5 * math.log(2 * math.pi * math.e * STD**2)  # nats


def data(n: int = 400) -> Tensor:
    """(n, 1), whose mean and variance are exactly the distribution's, so that its mean -log p is the entropy."""
    return MEAN + STD * exact(torch.randn(n, dtype=torch.float64))[:, None]


def bound(schedule: NoiseSchedule, num_steps: int, variance="beta", x0: Tensor | None = None):
    x0 = data() if x0 is None else x0
    noise = lambda: exact(torch.randn(len(x0), dtype=torch.float64), x0[:, 0])[:, None]  # noqa: E731
    return variational_bound(
        oracle.gaussian(schedule), x0, schedule, schedule.times(num_steps), noise, gaussian, variance
    )


def test_the_entropy_is_scipys():
    assert pytest.approx(stats.norm(MEAN, STD).entropy()) == ENTROPY == pytest.approx(0.7258, abs=1e-4)


def test_the_bound_of_ddpm_with_an_exact_predictor_is_the_entropy():
    """requirements: 0.7269 nats against 0.7258, the rest being the steps' finite length."""
    terms = bound(Linear(), 1000)
    assert terms.total.mean().item() == pytest.approx(0.7269, abs=1e-4)
    assert 0 < terms.total.mean().item() - ENTROPY < 0.002
    assert 0 < terms.prior.mean().item() < 1e-4  # alpha(1) is not quite zero


def test_the_bound_shrinks_with_the_steps_and_is_never_below_the_entropy():
    gaps = [bound(Flow(), n).total.mean().item() - ENTROPY for n in (100, 300, 1000)]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[2] < 0.005
    # the posterior's variance is that of a single known x0: too small for a density as smooth as this
    assert bound(Linear(), 1000, "posterior").total.mean().item() - ENTROPY > 0.1


def test_a_wrong_predictor_has_a_worse_bound():
    schedule, x0 = Linear(), data()

    def wrong(x: Tensor, t: Tensor) -> Tensor:
        return oracle.gaussian(schedule)(x, t) + 0.05

    terms = variational_bound(wrong, x0, schedule, schedule.times(1000), lambda: torch.randn_like(x0), gaussian, "beta")
    assert terms.total.mean().item() > ENTROPY + 0.5


def test_terms_are_those_of_the_papers_equation():
    """One step of three, by hand: KL(q(x_1 | x_2, x_0) || p(x_1 | x_2)) of two Gaussians."""
    schedule, x0 = Linear(num_steps=3, beta_start=0.1, beta_end=0.3), torch.tensor([[0.7], [-0.2]]).double()
    eps = torch.tensor([[0.3], [1.1]]).double()
    terms = variational_bound(lambda x, t: 0.5 * x, x0, schedule, schedule.times(3), lambda: eps, gaussian, "beta")
    betas = torch.tensor([0.1, 0.2, 0.3]).double()
    bars = (1 - betas).cumprod(0)
    total = torch.zeros(2, 1).double()
    for i in (2, 1):
        x_t = bars[i].sqrt() * x0 + (1 - bars[i]).sqrt() * eps

        def mean(x0: Tensor, i: int = i, x_t: Tensor = x_t) -> Tensor:  # eq. 7
            first = bars[i - 1].sqrt() * betas[i] / (1 - bars[i]) * x0
            return first + (1 - betas[i]).sqrt() * (1 - bars[i - 1]) / (1 - bars[i]) * x_t

        q = torch.distributions.Normal(mean(x0), ((1 - bars[i - 1]) / (1 - bars[i]) * betas[i]).sqrt())
        p = torch.distributions.Normal(mean(0.5 * x_t), betas[i].sqrt())
        total += torch.distributions.kl_divergence(q, p)
    x_1 = bars[0].sqrt() * x0 + (1 - bars[0]).sqrt() * eps
    decoder = torch.distributions.Normal(0.5 * x_1, betas[0].sqrt()).log_prob(x0)
    torch.testing.assert_close(terms.steps, total[:, 0])
    torch.testing.assert_close(terms.decoder, -decoder[:, 0])
    end = torch.distributions.Normal(bars[2].sqrt() * x0, (1 - bars[2]).sqrt())
    prior = torch.distributions.kl_divergence(end, torch.distributions.Normal(0, (1 - bars[2]).sqrt()))
    torch.testing.assert_close(terms.prior, prior[:, 0])


@pytest.mark.parametrize("std", [0.002, 0.01, 0.3])
@pytest.mark.parametrize("mean", [-1.2, -0.999, 0.0, 0.37, 1.0])
def test_the_discretized_gaussian_is_a_distribution_over_256_levels(mean: float, std: float):
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_p = discretized_gaussian(levels, torch.full_like(levels, mean), std)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)
    inner = slice(1, 255)
    expected = stats.norm.cdf(levels[inner] + 1 / 255, mean, std) - stats.norm.cdf(levels[inner] - 1 / 255, mean, std)
    torch.testing.assert_close(log_p[inner].exp(), torch.tensor(expected), rtol=1e-6, atol=1e-12)
    assert log_p.isfinite().all()  # also where scipy's difference is zero


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_the_odes_likelihood_is_the_densitys(schedule: NoiseSchedule):
    x0 = data()
    times = ode_times(schedule, 100)
    assert times[0] == 1 and times[-1].item() == pytest.approx(schedule.t_min, rel=1e-6) and (times.diff() < 0).all()
    found = ode_log_likelihood(oracle.gaussian(schedule), x0, schedule, times, torch.ones_like(x0))
    bits = (-found.mean().item() - ENTROPY) / math.log(2)
    assert bits == pytest.approx(0, abs=0.01)
    expected = torch.tensor(stats.norm(MEAN, STD).logpdf(x0[:, 0]))
    assert (found - expected).abs().max() < 0.15


def test_the_odes_likelihood_of_many_dimensions_with_a_probe():
    """A Gaussian with correlations: the divergence is estimated, without bias."""
    mixing = torch.eye(3).double() + 0.4 * torch.randn(3, 3).double()
    covariance, schedule = mixing @ mixing.T, Flow()

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        a, s = schedule.alpha(t), schedule.sigma(t)
        return a * x @ torch.linalg.solve(a**2 * covariance + s**2 * torch.eye(3), covariance)

    x0 = torch.randn(1, 3).double() @ mixing.T
    times = torch.linspace(1, 1e-3, 200, dtype=torch.float64)
    probes = torch.randint(0, 2, (2000, 3)).double() * 2 - 1
    found = ode_log_likelihood(denoise, x0.expand(2000, 3), schedule, times, probes).mean()
    expected = torch.distributions.MultivariateNormal(torch.zeros(3).double(), covariance).log_prob(x0[0])
    assert found.item() == pytest.approx(expected.item(), abs=0.1)


def test_a_clean_start_is_refused():
    with pytest.raises(ValueError, match="a little noise"):
        ode_log_likelihood(oracle.gaussian(Flow()), data(), Flow(), Flow().times(4), torch.ones(400, 1))
