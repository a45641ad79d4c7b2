import itertools

import pytest
import torch

from carrara.diffusion.parameterization import X0, Epsilon, Flow, Parameterization, V

ALL = [Epsilon(), X0(), V(), Flow()]
every_parameterization = pytest.mark.parametrize("p", ALL, ids=lambda p: p.name)
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
@pytest.mark.parametrize(("p", "q"), list(itertools.permutations(ALL, 2)), ids=lambda p: p.name)
def test_any_target_converts_to_any_other_and_back(
    p: Parameterization, q: Parameterization, alpha: float, sigma: float
):
    output, x_t = pair()  # any output of a network, not only one that agrees with some x0
    a, s = level(alpha, sigma)
    other = q.target(p.x0_hat(output, x_t, a, s), p.eps_hat(output, x_t, a, s), a, s)
    back = p.target(q.x0_hat(other, x_t, a, s), q.eps_hat(other, x_t, a, s), a, s)
    torch.testing.assert_close(back, output, rtol=1e-10, atol=1e-10)


@every_parameterization
def test_only_the_singular_say_nothing_about_x0_without_signal(p: Parameterization):
    x0, eps = pair()
    a, s = level(0, 1)
    x0_hat = p.x0_hat(p.target(x0, eps, a, s), eps, a, s)
    assert torch.allclose(x0_hat, x0) != p.singular_at_zero_snr


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
    torch.testing.assert_close(p.log_sensitivity(2 * (a / s).log()), slope.square().log(), rtol=1e-9, atol=1e-9)
