"""The deterministic samplers as solvers of the probability-flow ODE, on a Gaussian."""

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from carrara.diffusion.multistep import DPMSolverPP2M, UniPC
from carrara.diffusion.sampler import Ancestral, Euler, Heun, Sampler
from carrara.diffusion.schedule import EDM, Cosine, Flow, NoiseSchedule, Sigmoid, VarianceExploding
from carrara.diffusion.schedule_table import Linear
from tests.diffusion.oracle import MEAN, STD, gaussian


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Flow()], ids=["linear", "cosine", "flow"])
def test_euler_is_ddim_and_the_flow_velocity_step(schedule: NoiseSchedule):
    x, denoise = torch.randn(16, dtype=torch.float64), gaussian(schedule)
    times = schedule.times(20)
    sample = Euler()(denoise, x, schedule, times)
    assert torch.equal(sample, Ancestral(eta=0)(denoise, x, schedule, times))
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
    torch.testing.assert_close(Heun()(denoise, x, Flow(), times), expected, rtol=0, atol=1e-12)


def slope(counts: Sequence[int], errors: Sequence[float]) -> float:
    x, y = torch.tensor(counts).double().log(), torch.tensor(errors).double().log()
    return -((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()).item()


class Recorded:
    """Noise that is known afterwards."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []

    def __call__(self) -> Tensor:
        self.drawn.append(torch.randn(16, dtype=torch.float64))
        return self.drawn[-1]


def test_churn_is_algorithm_2_of_edm():
    """Karras et al. 2022, Algorithm 2, as it is written there."""
    schedule, noise, num_steps = EDM(), Recorded(), 8
    s_churn, s_min, s_max, s_noise = 4.0, 0.05, 50.0, 1.003
    x, denoise = 80 * torch.randn(16, dtype=torch.float64), gaussian(schedule)
    sampler = Heun(s_churn, s_min, s_max, s_noise)
    sample = sampler(denoise, x, schedule, schedule.times(num_steps), noise)
    drawn = iter(noise.drawn)
    sigmas = [level.sigma for level in schedule.levels(schedule.times(num_steps))]

    def estimate(x: Tensor, sigma: float) -> Tensor:
        variance = STD**2 + sigma**2
        return MEAN + STD**2 / variance * (x - MEAN)

    for now, then in pairwise(sigmas):
        gamma = min(s_churn / num_steps, math.sqrt(2) - 1) if s_min <= now <= s_max else 0
        hat = now + gamma * now
        if gamma > 0:
            x = x + math.sqrt(hat**2 - now**2) * s_noise * next(drawn)
        d = (x - estimate(x, hat)) / hat
        forward = x + (then - hat) * d
        if then != 0:
            d_then = (forward - estimate(forward, then)) / then
            forward = x + (then - hat) * (d + d_then) / 2
        x = forward
    assert len(noise.drawn) > 3 and next(drawn, None) is None
    torch.testing.assert_close(sample, x, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("sampler", "order"),
    [(Euler(), 1), (Heun(), 2), (DPMSolverPP2M(), 2), (UniPC(1), 2), (UniPC(2), 3), (UniPC(3), 4)],
    ids=["euler", "heun", "2m", "unipc_1", "unipc_2", "unipc_3"],
)
@pytest.mark.parametrize(
    "schedule",
    [Cosine(), Flow(), Sigmoid(), EDM(), VarianceExploding()],
    ids=lambda schedule: type(schedule).__name__,
)
@pytest.mark.parametrize("even_in", ["t", "logsnr"])
def test_order_of_convergence(sampler: Sampler, order: int, schedule: NoiseSchedule, even_in: str):
    """On a Gaussian the ODE keeps (x - alpha MEAN) / sqrt(alpha^2 STD^2 + sigma^2)."""
    logsnr = torch.tensor([-5.0, 5.0], dtype=torch.float64)
    ends = schedule.levels(schedule.t_from_logsnr(logsnr))
    first, last = (math.hypot(level.alpha * STD, level.sigma) for level in ends)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    start, exact_end = ends[0].alpha * MEAN + first * z, ends[1].alpha * MEAN + last * z
    counts, errors = [64, 128, 256, 512], []
    for n in counts:
        times = torch.linspace(ends[0].t.item(), ends[1].t.item(), n + 1, dtype=torch.float64)
        if even_in == "logsnr":
            times = schedule.t_from_logsnr(torch.linspace(-5, 5, n + 1, dtype=torch.float64))
        end = sampler(gaussian(schedule), start, schedule, times)
        errors.append((end - exact_end).abs().max().item())
    # steps even in t are far from even where SNR changes fast, and reach their order later
    assert slope(counts, errors) == pytest.approx(order, abs=0.15 if even_in == "logsnr" else 0.5)
