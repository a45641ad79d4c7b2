import itertools

import pytest
import torch

from carrara.diffusion.parameterization import EDM, Flow, Parameterization, Score, V
from tests.diffusion.oracle import SCHEDULES, TARGETS, is_singular

every_parameterization = pytest.mark.parametrize("p", TARGETS, ids=lambda p: p.name)
# variance-preserving, straight line, variance-exploding
LEVELS = pytest.mark.parametrize(("alpha", "sigma"), [(0.6, 0.8), (0.7, 0.3), (1.0, 40.0), (0.001, 0.999)])


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 3, 5, 5, dtype=torch.float64), torch.randn(4, 3, 5, 5, dtype=torch.float64)


def level(alpha: float, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((4, 1, 1, 1), alpha).double(), torch.full((4, 1, 1, 1), sigma).double()


@LEVELS
@every_parameterization
def test_x0_and_eps_follow_from_the_target(p: Parameterization, alpha: float, sigma: float):
    x0, eps = pair()
    a, s = level(alpha, sigma)
    x_t, output = a * x0 + s * eps, p.target(x0, eps, a, s)
    torch.testing.assert_close(p.x0_hat(output, x_t, a, s), x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(p.eps_hat(output, x_t, a, s), eps, rtol=0, atol=1e-10)


@LEVELS
@pytest.mark.parametrize(("p", "q"), list(itertools.permutations(TARGETS, 2)), ids=lambda p: p.name)
def test_any_target_converts_to_any_other_and_back(
    p: Parameterization, q: Parameterization, alpha: float, sigma: float
):
    output, x_t = pair()  # any output of a network, not only one that agrees with some x0
    a, s = level(alpha, sigma)
    other = q.target(p.x0_hat(output, x_t, a, s), p.eps_hat(output, x_t, a, s), a, s)
    back = p.target(q.x0_hat(other, x_t, a, s), q.eps_hat(other, x_t, a, s), a, s)
    torch.testing.assert_close(back, output, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SCHEDULES)
def test_targets_convert_on_every_schedule_at_every_time(name: str, dtype: torch.dtype):
    """Any output to any other target and back: 1e-10 in float64, in float32 1e-6 max(1, sigma/alpha, alpha/sigma)."""
    schedule = SCHEDULES[name]
    t = torch.linspace(1e-4, 1 - 1e-4, 400, dtype=torch.float64)
    a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    keep = (a > 0).flatten() & (s > 1e-12).flatten()  # EDM's sigma at 1e-4 is 1e-26
    ratio = torch.maximum(s / a, a / s).clamp(min=1)[keep]
    x0, eps = torch.randn(2, 400, 8, dtype=torch.float64)
    a, s, x0, eps = (value[keep].to(dtype) for value in (a, s, x0, eps))
    x_t = a * x0 + s * eps
    for p, q in itertools.permutations(TARGETS, 2):
        output = p.target(x0, eps, a, s)
        other = q.target(p.x0_hat(output, x_t, a, s), p.eps_hat(output, x_t, a, s), a, s)
        back = p.target(q.x0_hat(other, x_t, a, s), q.eps_hat(other, x_t, a, s), a, s)
        # in units of the target (the score's is 1 / sigma) and of the numbers drawn
        unit = p.target(torch.ones_like(a), torch.ones_like(a), a, s).abs().clamp(min=1)
        size = unit * torch.maximum(x0.abs(), eps.abs()).clamp(min=1)
        error = ((back - output) / size).double().abs()
        bound = 1e-10 * ratio if dtype == torch.float64 else 1e-6 * ratio
        assert (error <= bound).all(), (p.name, q.name, (error / ratio).max())


@every_parameterization
def test_only_epsilon_and_score_say_nothing_about_x0_without_signal(p: Parameterization):
    determinant = p.determinant(torch.zeros(()), torch.ones(()))
    assert (determinant == 0) == is_singular(SCHEDULES["flow"], p)
    if determinant != 0:
        x0, eps = pair()
        a, s = level(0, 1)
        torch.testing.assert_close(p.x0_hat(p.target(x0, eps, a, s), eps, a, s), x0)


def test_score_is_the_gradient_of_the_log_density():
    x0 = torch.randn(5, dtype=torch.float64)
    x_t = torch.randn(5, dtype=torch.float64, requires_grad=True)
    alpha, sigma = torch.tensor(0.7).double(), torch.tensor(0.4).double()
    log_density = torch.distributions.Normal(alpha * x0, sigma).log_prob(x_t).sum()
    (gradient,) = torch.autograd.grad(log_density, x_t)
    eps = (x_t.detach() - alpha * x0) / sigma
    torch.testing.assert_close(Score().target(x0, eps, alpha, sigma), gradient)


@pytest.mark.parametrize("sigma", [0.002, 0.5, 3.0, 80.0])
def test_edm_has_the_papers_coefficients(sigma: float):
    """Karras et al. 2022, table 1, where alpha is 1; on any other schedule for x_t / alpha and sigma / alpha."""
    sigma_data, network = 0.5, torch.randn(6, dtype=torch.float64)
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2) ** 0.5
    c_in = 1 / (sigma**2 + sigma_data**2) ** 0.5
    x = torch.randn(6, dtype=torch.float64)
    for alpha in (1.0, 0.3):
        a, s = torch.tensor(alpha).double(), torch.tensor(alpha * sigma).double()
        p = EDM(sigma_data)
        torch.testing.assert_close(p.x0_hat(network, alpha * x, a, s), c_skip * x + c_out * network)
        torch.testing.assert_close(p.c_in(a, s) * alpha * x, c_in * x)


def test_edm_with_unit_data_is_minus_v():
    x0, eps = pair()
    for alpha, sigma in [(0.6, 0.8), (1, 40), (0.2, 0.7)]:
        a, s = level(alpha, sigma)
        torch.testing.assert_close(EDM(1.0).target(x0, eps, a, s), -V().target(x0, eps, a, s))


def test_edm_has_input_and_target_of_unit_variance():
    x0, eps = 0.5 * torch.randn(200_000), torch.randn(200_000)
    for alpha, sigma in [(1.0, 0.01), (1.0, 80.0), (0.7, 0.7)]:
        a, s = torch.tensor(alpha), torch.tensor(sigma)
        p = EDM(0.5)
        assert p.target(x0, eps, a, s).std().item() == pytest.approx(1, abs=0.01)
        assert (p.c_in(a, s) * (a * x0 + s * eps)).std().item() == pytest.approx(1, abs=0.01)


def test_only_edm_scales_its_input():
    a, s = torch.tensor(0.3), torch.tensor(0.8)
    assert [p.name for p in TARGETS if p.c_in(a, s) != 1] == ["edm"]
    with pytest.raises(ValueError, match="sigma_data"):
        EDM(0)


def test_v_is_salimans_and_hos_and_of_unit_size_on_any_schedule():
    x0, eps = pair()
    a, s = level(0.6, 0.8)
    torch.testing.assert_close(V().target(x0, eps, a, s), a * eps - s * x0)
    for alpha, sigma in [(0.5, 0.5), (1, 40)]:
        assert V().target(x0, eps, *level(alpha, sigma)).square().mean().item() == pytest.approx(1, abs=0.3)


def test_flow_is_the_velocity_of_the_straight_line():
    x0, eps = pair()
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x_t = (1 - t) * x0[0, 0, 0, 0] + t * eps[0, 0, 0, 0]
    (velocity,) = torch.autograd.grad(x_t, t)
    torch.testing.assert_close(Flow().target(x0, eps, 1 - t, t)[0, 0, 0, 0], velocity)


@LEVELS
@every_parameterization
def test_log_sensitivity_is_that_of_x0_hat(p: Parameterization, alpha: float, sigma: float):
    a, s = torch.tensor(alpha).double(), torch.tensor(sigma).double()
    output = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(p.x0_hat(output, torch.ones(()).double(), a, s), output)
    torch.testing.assert_close(p.log_sensitivity(a, s), slope.square().log(), rtol=1e-9, atol=1e-9)
