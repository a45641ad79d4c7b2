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
Steps = Iterator[tuple[Tensor, Tensor]]


class Sampler(ABC):
    """From x at the first time to a sample at the last; at t = 1, x is schedule.prior_scale * eps.

    The step to t = 0 adds no noise. The arithmetic is in float32, or in float64 if x is, also under autocast, which
    reaches only `denoise`: sums and products of tensors keep their dtype, and the coefficients are Python floats.
    """

    draws_noise: bool = False

    @abstractmethod
    def steps(self, denoise: Denoise, x: Tensor, schedule: NoiseSchedule, levels: list[Level], noise: Noise) -> Steps:
        """Yields x at levels[1], levels[2], ..., each with the x0_hat that led to it."""

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        schedule: NoiseSchedule,
        times: Tensor,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """The sample, of the shape of x.

        Args:
            denoise: the model, x_t and t to x0_hat.
            x: (B, ...) at times[0].
            schedule: of the noise in x.
            times: (N + 1,), falling (`carrara.diffusion.spacing`); the last need not be 0.
            noise: gives fresh noise, for the samplers that draw it.
            on_step: told (step, t, x, x0_hat) after every step.

        Raises:
            ValueError: the times do not fall, or there is no noise for a sampler that draws it.
        """
        if (times.diff() >= 0).any():
            raise ValueError(f"a sampler's times must fall, but they are {times.tolist()}")
        if noise is None and self.draws_noise:
            raise ValueError(f"{type(self).__name__} as it is set draws noise, and it was given none")
        levels = schedule.levels(times)

        def denoise_in_x_dtype(x_t: Tensor, t: Tensor) -> Tensor:
            return denoise(x_t, t).to(x_t.dtype)

        sample = x = x if x.dtype == torch.float64 else x.float()
        steps = self.steps(denoise_in_x_dtype, x, schedule, levels, noise or _no_noise)
        for k, (sample, x0_hat) in enumerate(steps):
            if on_step is not None:
                on_step(k, levels[k + 1].t, sample, x0_hat)
        return sample


def _no_noise() -> Tensor:
    raise AssertionError("a sampler that says it draws no noise has drawn some")


def eps_from(x: Tensor, x0_hat: Tensor, now: Level) -> Tensor:
    """The noise that x = alpha x0_hat + sigma eps holds."""
    return (x - now.alpha * x0_hat) / now.sigma


def forward_variance(now: Level, then: Level) -> float:
    """The variance of q(x_now | x_then), the noise that is added on the way from `then` to the noisier `now`."""
    return max(now.sigma**2 - (now.alpha / then.alpha * then.sigma) ** 2, 0)


class Ancestral(Sampler):
    """x0_hat with noise put back, part of it the old noise, part fresh (DDIM, Song et al. 2021, eq. 12, 16).

    eta = 1 draws from q(x_s | x_t, x0_hat), which is DDPM's Algorithm 2 and, on sigma / alpha, the Euler ancestral
    sampler. eta = 0 is deterministic DDIM, which is also Euler's method on the probability-flow ODE. With eta = 1,
    `variance` is that of the fresh noise: the posterior's (beta tilde) or the forward step's (beta), Ho et al. 2020,
    section 3.2.
    """

    def __init__(self, eta: float = 1.0, variance: Literal["posterior", "beta"] = "posterior") -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], but is {eta}")
        if variance not in ("posterior", "beta"):
            raise ValueError(f"variance must be posterior or beta, but is {variance}")
        if variance == "beta" and eta != 1:
            raise ValueError(f"variance=beta is a choice for eta=1 only, but eta is {eta}")
        self.eta = eta
        self.variance = variance
        self.draws_noise = eta > 0

    def step(self, x: Tensor, x0_hat: Tensor, now: Level, then: Level, noise: Noise) -> Tensor:
        """x at `then`, from x at `now`."""
        forward = forward_variance(now, then)
        fresh = self.eta**2 * forward * (then.sigma / now.sigma) ** 2
        x = then.alpha * x0_hat + math.sqrt(max(then.sigma**2 - fresh, 0)) * eps_from(x, x0_hat, now)
        if fresh > 0:
            x = x + math.sqrt(fresh if self.variance == "posterior" else forward) * noise()
        return x

    def steps(self, denoise: Denoise, x: Tensor, schedule: NoiseSchedule, levels: list[Level], noise: Noise) -> Steps:
        for now, then in pairwise(levels):
            x0_hat = denoise(x, now.t)
            x = self.step(x, x0_hat, now, then, noise)
            yield x, x0_hat


class Euler(Ancestral):
    """Euler's method on the probability-flow ODE: first order, one call a step. It is DDIM; for flow, x + dt v."""

    def __init__(self) -> None:
        super().__init__(eta=0.0)


class Heun(Sampler):
    """Heun's method on the probability-flow ODE: second order, two calls a step, one in that to sigma = 0.

    Where alpha is 1, steps are straight in x over sigma, whose slope is eps (Karras et al. 2022, Algorithm 1).
    Elsewhere they are straight in x / (alpha + sigma) over sigma / (alpha + sigma), whose slope is eps - x0 and which,
    unlike x / alpha over sigma / alpha, stays small where alpha is nearly zero; for flow that is x over t.

    Args:
        s_churn: more than 0 first adds noise in every step, up to sigma / alpha (1 + s_churn / num_steps) but not above
            the noise at t = 1, and takes it away again (ib., Algorithm 2).
        s_tmin, s_tmax: the least and greatest sigma / alpha at which it does; None is no greatest.
        s_noise: standard deviation of what it adds.
    """

    def __init__(
        self, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float | None = None, s_noise: float = 1.0
    ) -> None:
        if s_churn < 0:
            raise ValueError(f"s_churn must not be negative, but is {s_churn}")
        self.s_churn, self.s_noise = s_churn, s_noise
        self.s_tmin, self.s_tmax = s_tmin, math.inf if s_tmax is None else s_tmax
        self.draws_noise = s_churn > 0

    def steps(self, denoise: Denoise, x: Tensor, schedule: NoiseSchedule, levels: list[Level], noise: Noise) -> Steps:
        gamma = min(self.s_churn / (len(levels) - 1), math.sqrt(2) - 1)
        of_sigma = 0.0 if levels[0].alpha == 1 else 1.0
        for now, then in pairwise(levels):
            if gamma > 0 and now.alpha > 0 and self.s_tmin <= now.sigma / now.alpha <= self.s_tmax:
                more = now.logsnr - 2 * math.log1p(gamma)
                above = schedule.levels(schedule.t_from_logsnr(torch.tensor([more], dtype=torch.float64)))[0]
                added = forward_variance(above, now)
                if added > 0:  # at t = 1 there is none above
                    x = above.alpha / now.alpha * x + self.s_noise * math.sqrt(added) * noise()
                    now = above
            x0_hat = denoise(x, now.t)
            eps_hat = eps_from(x, x0_hat, now)
            euler = then.alpha * x0_hat + then.sigma * eps_hat
            if then.sigma > 0:
                x0_then = denoise(euler, then.t)
                turn = eps_from(euler, x0_then, then) - eps_hat - of_sigma * (x0_then - x0_hat)
                r_now, r_then = now.alpha + of_sigma * now.sigma, then.alpha + of_sigma * then.sigma
                euler = euler + (then.sigma - now.sigma * r_then / r_now) / 2 * turn
            x = euler
            yield x, x0_hat
