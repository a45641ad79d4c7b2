"""Which times a model is trained at. A time sampler is an inverse distribution function: uniform u -> t."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from carrara.diffusion.schedule import NoiseSchedule


class TimeSampler(ABC):
    """Maps u, uniform in (0, 1), to times from the schedule's `t_least` to 1, of u's shape and dtype; draws nothing."""

    def check(self, schedule: NoiseSchedule) -> None:  # noqa: B027
        """ValueError where the schedule has no such times; most are on every schedule."""

    @abstractmethod
    def __call__(self, u: Tensor, schedule: NoiseSchedule) -> Tensor: ...


def _of_the_way(share: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The time at this share of the way from the least to the most noise."""
    return (schedule.t_least + (1 - schedule.t_least) * share).clamp(schedule.t_least, 1)


class Uniform(TimeSampler):
    """Every time equally often; with `num_steps` = T, t = i/T for i = 1..T (Ho et al. 2020, Algorithm 1)."""

    def __init__(self, num_steps: int | None = None) -> None:
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"num_steps must be at least 1 or null, but is {num_steps}")
        self.num_steps = num_steps

    def __call__(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        if self.num_steps is None:
            return _of_the_way(u, schedule)
        return ((u * self.num_steps).floor() + 1).clamp(1, self.num_steps) / self.num_steps


class LogitNormal(TimeSampler):
    """logit(t) ~ N(mean, std^2): the middle of the way, where flow is hardest (Esser et al. 2024, eq. 19)."""

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        if std <= 0:
            raise ValueError(f"std must be positive, but is {std}")
        self.mean = mean
        self.std = std

    def __call__(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        return _of_the_way(torch.sigmoid(self.mean + self.std * torch.special.ndtri(u)), schedule)


class Mode(TimeSampler):
    """More of the middle for scale > 0, of the ends for scale < 0, and all of both (Esser et al. 2024, eq. 20)."""

    def __init__(self, scale: float = 1.29) -> None:
        if not -1 <= scale <= 2 / (math.pi - 2):
            raise ValueError(f"scale must lie in [-1, 2 / (pi - 2)], but is {scale}")
        self.scale = scale

    def __call__(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        # the paper's f(1 - u), which rises with u
        return _of_the_way(u - self.scale * ((math.pi / 2 * u).sin() ** 2 - u), schedule)


class LogNormal(TimeSampler):
    """ln(sigma / alpha) ~ N(mean, std^2), on any schedule (Karras et al. 2022, table 1: P_mean and P_std)."""

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        if std <= 0:
            raise ValueError(f"std must be positive, but is {std}")
        self.mean = mean
        self.std = std

    def __call__(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        return schedule.t_from_logsnr(-2 * (self.mean + self.std * torch.special.ndtri(u))).clamp(schedule.t_least, 1)


class SingleLevel(TimeSampler):
    """One noise level, sigma / alpha = `sigma`: a denoising auto-encoder (Vincent et al. 2008)."""

    def __init__(self, sigma: float) -> None:
        if sigma <= 0:
            raise ValueError(f"sigma must be positive, but is {sigma}")
        self.sigma = sigma

    def check(self, schedule: NoiseSchedule) -> None:
        most, least = schedule.levels(torch.tensor([1.0, schedule.t_least], dtype=torch.float64))
        if not most.logsnr <= -2 * math.log(self.sigma) <= least.logsnr:
            low, high = (math.exp(-level.logsnr / 2) for level in (least, most))
            raise ValueError(
                f"sigma={self.sigma:g} is no noise level of the {type(schedule).__name__} schedule, whose sigma / alpha"
                f" lies between {low:.3g} and {high:.3g}"
            )

    def __call__(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        return schedule.t_from_logsnr(torch.full_like(u, -2 * math.log(self.sigma))).clamp(schedule.t_least, 1)
