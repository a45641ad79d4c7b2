"""How likely a model finds pictures: the variational bound, and the likelihood of the probability-flow ODE."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from carrara.diffusion.sampler import Denoise, Noise, forward_variance
from carrara.diffusion.schedule import Level, NoiseSchedule

Decoder = Callable[[Tensor, Tensor, float], Tensor]  # (x0, mean (B, ...), std) -> log p(x0) of each element (B, ...)


@dataclass(frozen=True)
class VariationalBound:
    """The terms of -log p(x0) <= L_T + sum of L_{t-1} + L_0 (Ho et al. 2020, eq. 5), in nats a sample, (B,) float64.

    Attributes:
        prior: L_T, what x_1 still knows of x0.
        steps: the sum of the L_{t-1}, t > 1.
        decoder: L_0.
    """

    prior: Tensor
    steps: Tensor
    decoder: Tensor

    @property
    def total(self) -> Tensor:
        return self.prior + self.steps + self.decoder


def variational_bound(
    denoise: Denoise,
    x0: Tensor,
    schedule: NoiseSchedule,
    times: Tensor,
    noise: Noise,
    decoder: Decoder,
    variance: Literal["posterior", "beta"] = "posterior",
) -> VariationalBound:
    """The bound for the sampler `Ancestral(variance=variance)`, one draw of x_t in each term.

    Args:
        denoise: the model.
        x0: (B, ...).
        schedule: with its `prior_scale` as the standard deviation of the prior.
        times: (N + 1,) falling from 1 to 0.
        noise: gives standard normal noise of x0's shape.
        decoder: `gaussian` for continuous data, `discretized_gaussian` for pictures of 256 levels.
        variance: of p(x_s | x_t); the posterior's is the least, beta the greatest that a step can need.
    """
    levels = schedule.levels(times)
    first, dims = levels[0], x0[0].numel()
    prior = (first.alpha / first.sigma) ** 2 / 2 * _sum(x0.square())
    steps, last = torch.zeros_like(prior), torch.zeros_like(prior)
    for now, then in pairwise(levels):
        x0_hat = denoise(now.alpha * x0 + now.sigma * noise(), now.t).to(x0.dtype)
        forward = forward_variance(now, then)
        if then.sigma == 0:
            last = -_sum(decoder(x0, then.alpha * x0_hat, math.sqrt(forward)))
            continue
        posterior = forward * (then.sigma / now.sigma) ** 2
        model = posterior if variance == "posterior" else forward
        # the posterior's mean is affine in x0, with this slope (DDIM, Song et al. 2021, eq. 7)
        slope = then.alpha - math.sqrt(max(then.sigma**2 - posterior, 0)) * now.alpha / now.sigma
        steps += slope**2 / (2 * model) * _sum((x0 - x0_hat).square())
        steps += dims / 2 * (math.log(model / posterior) + posterior / model - 1)
    return VariationalBound(prior, steps, last)


def gaussian(x0: Tensor, mean: Tensor, std: float) -> Tensor:
    """log N(x0; mean, std^2)."""
    return -((x0 - mean).double() / std).square() / 2 - math.log(std * math.sqrt(2 * math.pi))


def discretized_gaussian(x0: Tensor, mean: Tensor, std: float | Tensor) -> Tensor:
    """log of the Gaussian's mass on the level that x0 is one of 256 of (Ho et al. 2020, eq. 13).

    The levels lie 2/255 apart in [-1, 1]; the mass beyond belongs to the first and the last.
    """
    centred = (x0 - mean).double()
    upper = torch.where(x0 > 0.999, torch.inf, (centred + 1 / 255) / std)
    lower = torch.where(x0 < -0.999, -torch.inf, (centred - 1 / 255) / std)
    # on the side where both cumulative probabilities are small, so that their difference is exact
    right = lower > 0
    upper, lower = torch.where(right, -lower, upper), torch.where(right, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return log_upper + torch.log1p(-(log_lower - log_upper).exp())


def ode_times(schedule: NoiseSchedule, num_steps: int) -> Tensor:
    """Times for `ode_log_likelihood`, (num_steps + 1,), even in log SNR: near t = 0 a density changes fastest."""
    ends = schedule.logsnr(torch.tensor([1, schedule.t_min], dtype=torch.float64))
    even = torch.linspace(max(ends[0].item(), -10), ends[1].item(), num_steps + 1, dtype=torch.float64)
    times = schedule.t_from_logsnr(even)
    times[0] = 1
    return times


def ode_log_likelihood(denoise: Denoise, x0: Tensor, schedule: NoiseSchedule, times: Tensor, probe: Tensor) -> Tensor:
    """log p(x0) of the probability-flow ODE's samples (Song et al. 2021, eq. 39), in nats, (B,) float64.

    Heun's method from the last time, which must be noisy, up to the first, in coordinates that are finite for every
    schedule: y = x / r with r = alpha + sigma, b = sigma / r and dy/db = eps - x0.

    Args:
        denoise: the model; its gradient with respect to x is taken.
        x0: (B, ...), taken as x at the last time.
        schedule: of the noise.
        times: (N + 1,) falling from 1 to a time above 0.
        probe: (B, ...) of random signs: Skilling's and Hutchinson's estimate of the divergence, without bias and exact
            where no element's estimate depends on another's.

    Raises:
        ValueError: the last time is clean.
    """
    levels = schedule.levels(times.flip(0))
    if levels[0].sigma == 0:
        raise ValueError("the ODE's likelihood starts at a little noise: the last of its times must be above 0")

    def slope(y: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """dy/db and its divergence."""
        r = level.alpha + level.sigma
        x = (r * y).detach().requires_grad_()
        with torch.enable_grad():
            x0_hat = denoise(x, level.t).to(x.dtype)
            (product,) = torch.autograd.grad(x0_hat, x, probe)
        x0_hat = x0_hat.detach()
        eps_hat = (x.detach() - level.alpha * x0_hat) / level.sigma
        # of (x - r x0_hat) / sigma, with dx/dy = r
        divergence = r / level.sigma * (y[0].numel() - r * _sum(probe * product))
        return eps_hat - x0_hat, divergence

    start, end = levels[0], levels[-1]
    y = x0 / (start.alpha + start.sigma)
    change = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
    for now, then in pairwise(levels):
        step = then.sigma / (then.alpha + then.sigma) - now.sigma / (now.alpha + now.sigma)
        first, divergence = slope(y, now)
        second, divergence_then = slope(y + step * first, then)
        y = y + step / 2 * (first + second)
        change += step / 2 * (divergence + divergence_then)
    r_start, r_end = start.alpha + start.sigma, end.alpha + end.sigma
    prior = _sum(gaussian(r_end * y, torch.zeros_like(y), end.sigma))
    return prior + change + y[0].numel() * math.log(r_end / r_start)


def _sum(x: Tensor) -> Tensor:
    """Over all but the batch, in float64."""
    return x.double().flatten(1).sum(1)
