"""The deterministic samplers as solvers of the probability-flow ODE, on a Gaussian."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from carrara.diffusion.sampler import Ancestral, DPMSolverPP2M, Euler, Heun, Sampler
from carrara.diffusion.schedule import Cosine, Flow, Linear, NoiseSchedule

MEAN, STD = 0.5, 0.5


def gaussian(schedule: NoiseSchedule) -> Callable[[Tensor, Tensor], Tensor]:
    """E[x0 | x_t] for x0 ~ N(MEAN, STD^2)."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        a, s = schedule.alpha(t), schedule.sigma(t)
        return MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MEAN)

    return denoise


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Flow()], ids=["linear", "cosine", "flow"])
def test_euler_is_ddim_and_the_flow_velocity_step(schedule: NoiseSchedule):
    x, denoise = torch.randn(16, dtype=torch.float64), gaussian(schedule)
    sample = Euler()(denoise, x, schedule, 20)
    assert torch.equal(sample, Ancestral(eta=0)(denoise, x, schedule, 20))
    levels = schedule.levels(schedule.times(20))
    y = x / (levels[0].alpha + levels[0].sigma)
    for now, then in pairwise(levels):
        r = now.alpha + now.sigma
        x0_hat = denoise(r * y, now.t)
        eps_hat = (r * y - now.alpha * x0_hat) / now.sigma
        y = y + (then.sigma / (then.alpha + then.sigma) - now.sigma / r) * (eps_hat - x0_hat)
    torch.testing.assert_close(sample, y, rtol=0, atol=1e-9)


def test_heun_on_flow_is_heuns_method_on_the_velocity():
    x, denoise = torch.randn(16, dtype=torch.float64), gaussian(Flow())

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return (x - denoise(x, t)) / t

    expected, times = x, Flow().times(5)
    for now, then in pairwise(times):
        v = velocity(expected, now)
        if then > 0:
            v = (v + velocity(expected + (then - now) * v, then)) / 2
        expected = expected + (then - now) * v
    torch.testing.assert_close(Heun()(denoise, x, Flow(), 5), expected, rtol=0, atol=1e-12)


def slope(counts: Sequence[int], errors: Sequence[float]) -> float:
    x, y = torch.tensor(counts).double().log(), torch.tensor(errors).double().log()
    return -((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()).item()


@pytest.mark.parametrize(("sampler", "order"), [(Euler(), 1), (Heun(), 2), (DPMSolverPP2M(), 2)])
@pytest.mark.parametrize("schedule", [Cosine(), Flow()], ids=["cosine", "flow"])
@pytest.mark.parametrize("even_in", ["t", "logsnr"])
def test_order_of_convergence(sampler: Sampler, order: int, schedule: NoiseSchedule, even_in: str):
    """On a Gaussian the ODE keeps (x - alpha MEAN) / sqrt(alpha^2 STD^2 + sigma^2)."""
    logsnr = torch.tensor([-5.0, 5.0], dtype=torch.float64)
    ends = schedule.levels(schedule.t_from_logsnr(logsnr))
    first, last = (math.hypot(level.alpha * STD, level.sigma) for level in ends)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    start, exact_end = ends[0].alpha * MEAN + first * z, ends[1].alpha * MEAN + last * z
    counts, errors = [32, 64, 128, 256, 512], []
    for n in counts:
        times = torch.linspace(ends[0].t.item(), ends[1].t.item(), n + 1, dtype=torch.float64)
        if even_in == "logsnr":
            times = schedule.t_from_logsnr(torch.linspace(-5, 5, n + 1, dtype=torch.float64))
        end = sampler(gaussian(schedule), start, schedule, n, times=times)
        errors.append((end - exact_end).abs().max().item())
    assert slope(counts, errors) == pytest.approx(order, abs=0.15)
