"""Which times a model is trained at. A time sampler is an inverse distribution function: uniform u -> t."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

T_MIN = 1e-5  # at t = 0 there is no noise to learn from, and log SNR is infinite


class TimeSampler(ABC):
    """Maps u, uniform in (0, 1), to times in [T_MIN, 1], of u's shape and dtype. It draws nothing itself."""

    @abstractmethod
    def __call__(self, u: Tensor) -> Tensor: ...


class Uniform(TimeSampler):
    """Every time equally often; with `num_steps` = T, t = i/T for i = 1..T (Ho et al. 2020, Algorithm 1)."""

    def __init__(self, num_steps: int | None = None) -> None:
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"num_steps must be at least 1 or null, but is {num_steps}")
        self.num_steps = num_steps

    def __call__(self, u: Tensor) -> Tensor:
        if self.num_steps is None:
            return u.clamp(T_MIN, 1)
        return ((u * self.num_steps).floor() + 1).clamp(1, self.num_steps) / self.num_steps


class LogitNormal(TimeSampler):
    """logit(t) ~ N(mean, std^2): the middle of the way, where flow is hardest (Esser et al. 2024, eq. 19)."""

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        if std <= 0:
            raise ValueError(f"std must be positive, but is {std}")
        self.mean = mean
        self.std = std

    def __call__(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u)).clamp(T_MIN, 1)
