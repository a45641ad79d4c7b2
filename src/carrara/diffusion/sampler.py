"""Samplers: loops over times around denoise(x_t, t) -> x0_hat. They know no network, text or guidance."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from carrara.diffusion.schedule import Level, NoiseSchedule

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x_t (B, ...), t ()) -> x0_hat (B, ...)
Noise = Callable[[], Tensor]  # standard normal, the shape of x
OnStep = Callable[[int, Tensor, Tensor, Tensor], None]  # (step, t (), x at t, the x0_hat that led to it)
Spacing = Callable[[NoiseSchedule, int], Tensor]  # (schedule, num_steps) -> falling times (num_steps + 1,)


def uniform(schedule: NoiseSchedule, num_steps: int) -> Tensor:
    """Even steps in t, on the table's indices where the schedule has a table."""
    return schedule.times(num_steps)


class Sampler(ABC):
    """From x = schedule.prior_scale * eps at t = 1 to a sample at t = 0, with no noise in the last step.

    The arithmetic is in float32, or in float64 if x is, also under autocast, which reaches only `denoise`:
    sums and products of tensors keep their dtype, and the coefficients are Python floats.
    """

    def __init__(self, spacing: Spacing = uniform) -> None:
        self.spacing = spacing

    @abstractmethod
    def steps(
        self, denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields x at levels[1], levels[2], ..., each with the x0_hat that led to it."""

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        schedule: NoiseSchedule,
        num_steps: int,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """The sample, of the shape of x.

        `times`, if given, replaces `num_steps` and the spacing, to start or stop midway; x is at times[0].
        Raises ValueError if the times do not fall, or if the sampler needs `noise` and there is none.
        """
        x = x if x.dtype == torch.float64 else x.float()
        times = self.spacing(schedule, num_steps) if times is None else times
        if (times.diff() >= 0).any():
            raise ValueError(f"a sampler's times must fall, but they are {times.tolist()}")
        levels = schedule.levels(times)

        def denoise_in_x_dtype(x_t: Tensor, t: Tensor) -> Tensor:
            return denoise(x_t, t).to(x_t.dtype)

        sample = x
        for k, (sample, x0_hat) in enumerate(self.steps(denoise_in_x_dtype, x, levels, noise)):
            if on_step is not None:
                on_step(k, levels[k + 1].t, sample, x0_hat)
        return sample


class Ancestral(Sampler):
    """x0_hat with noise put back, part of it the old noise, part fresh (DDIM, Song et al. 2021, eq. 12, 16).

    eta = 1 draws from q(x_s | x_t, x0_hat), DDPM's Algorithm 2; eta = 0 is deterministic DDIM, which is also
    Euler's method on the probability-flow ODE. With eta = 1, `variance` is that of the fresh noise: the
    posterior's (beta tilde) or the forward step's (beta), Ho et al. 2020, section 3.2.
    """

    def __init__(
        self,
        eta: float = 1.0,
        variance: Literal["posterior", "beta"] = "posterior",
        spacing: Spacing = uniform,
    ) -> None:
        super().__init__(spacing)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], but is {eta}")
        if variance not in ("posterior", "beta"):
            raise ValueError(f"variance must be posterior or beta, but is {variance}")
        if variance == "beta" and eta != 1:
            raise ValueError(f"variance=beta is a choice for eta=1 only, but eta is {eta}")
        self.eta = eta
        self.variance = variance

    def steps(
        self, denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if noise is None and self.eta > 0:
            raise ValueError(f"a sampler with eta={self.eta} needs noise")
        for now, then in pairwise(levels):
            x0_hat = denoise(x, now.t)
            eps_hat = (x - now.alpha * x0_hat) / now.sigma
            forward = max(now.sigma**2 - (now.alpha / then.alpha * then.sigma) ** 2, 0)  # of q(x_t | x_s)
            fresh = self.eta**2 * forward * (then.sigma / now.sigma) ** 2
            x = then.alpha * x0_hat + math.sqrt(max(then.sigma**2 - fresh, 0)) * eps_hat
            if noise is not None and fresh > 0:
                x = x + math.sqrt(fresh if self.variance == "posterior" else forward) * noise()
            yield x, x0_hat


class Euler(Ancestral):
    """Euler's method on the probability-flow ODE, in x / alpha over sigma / alpha or, for flow, in x over t.

    Both are the same step, DDIM's (Song et al. 2021, eq. 14).
    """

    def __init__(self, spacing: Spacing = uniform) -> None:
        super().__init__(eta=0.0, spacing=spacing)


class Heun(Sampler):
    """Heun's method on the probability-flow ODE: second order, two calls a step, one in that to sigma = 0.

    (Karras et al. 2022, Algorithm 1, in other coordinates.) With r = alpha + sigma and b = sigma / r, any
    schedule is the straight line y = x / r = (1 - b) x0 + b eps, where dy/db = eps - x0; for flow, y = x and
    b = t. Unlike sigma / alpha, b stays finite where alpha is zero or nearly so.
    """

    def steps(
        self, denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for now, then in pairwise(levels):
            x0_hat = denoise(x, now.t)
            eps_hat = (x - now.alpha * x0_hat) / now.sigma
            euler = then.alpha * x0_hat + then.sigma * eps_hat
            if then.sigma > 0:
                x0_then = denoise(euler, then.t)
                turn = (euler - then.alpha * x0_then) / then.sigma - x0_then - (eps_hat - x0_hat)
                r_now, r_then = now.alpha + now.sigma, then.alpha + then.sigma
                euler = euler + r_then * (then.sigma / r_then - now.sigma / r_now) / 2 * turn
            x = euler
            yield x, x0_hat


class DPMSolverPP2M(Sampler):
    """DPM-Solver++(2M): second order from one call a step and the last one's (Lu et al. 2022, Algorithm 2).

    The first step and the last, to sigma = 0, are of first order. A step from alpha = 0 or to sigma = 0 is
    infinitely long in lambda = log(alpha / sigma), and its limit is taken.

    With `stochastic` it solves the diffusion's SDE instead of the ODE (ib., SDE-DPM-Solver++(2M)): the noise of a
    step is fresh, so that an early step that decided wrongly can be taken back. Without the second order that is
    `Ancestral`.
    """

    def __init__(self, stochastic: bool = False, spacing: Spacing = uniform) -> None:
        super().__init__(spacing)
        self.stochastic = stochastic

    def steps(
        self, denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if self.stochastic and noise is None:
            raise ValueError("a stochastic sampler needs noise")
        before, h_before = None, math.inf
        for now, then in pairwise(levels):
            x0_hat = denoise(x, now.t)
            h = (then.logsnr - now.logsnr) / 2
            ahead = x0_hat
            if before is not None and math.isfinite(h):
                ahead = x0_hat + h / (2 * h_before) * (x0_hat - before)
            kept, span = (math.exp(-h), 2 * h) if self.stochastic else (1.0, h)
            x = kept * then.sigma / now.sigma * x - then.alpha * math.expm1(-span) * ahead
            if self.stochastic and noise is not None and then.sigma > 0:
                x = x + then.sigma * math.sqrt(-math.expm1(-span)) * noise()
            before, h_before = x0_hat, h
            yield x, x0_hat
