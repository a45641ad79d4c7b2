"""The training objective, and the denoiser that it makes of a network."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from carrara.diffusion.parameterization import Parameterization
from carrara.diffusion.sampler import Denoise
from carrara.diffusion.schedule import NoiseSchedule
from carrara.diffusion.time_sampling import TimeSampler
from carrara.diffusion.weighting import LossWeighting

C = TypeVar("C")
Network = Callable[[Tensor, Tensor, C], Tensor]  # (c_in x_t (B, ...), c_noise (B,), conditioning) -> output (B, ...)
Predict = Callable[[Tensor, Tensor], Tensor]  # (x_t (B, ...), t () or (B,)) -> the network's output (B, ...)


class Objective:
    """Schedule, target, times and weights: a way to train a network to denoise (Ho et al. 2020, Algorithm 1).

    It draws nothing: noise and uniforms are passed in. Its arithmetic is in float32, or in float64 if x0 is,
    also under autocast, which leaves sums and products as they are and reaches only the network.

    Raises ValueError, naming both parts, when the target says nothing about x0 at the schedule's last time, or when
    the schedule has no such times.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        parameterization: Parameterization,
        time_sampling: TimeSampler,
        weighting: LossWeighting,
    ) -> None:
        end = torch.ones((), dtype=torch.float64)
        determinant = parameterization.determinant(schedule.alpha(end), schedule.sigma(end))
        if determinant == 0 or not determinant.isfinite():
            raise ValueError(
                f"the {parameterization.name} parameterization is singular with the {type(schedule).__name__}"
                " schedule, whose SNR at t = 1 is zero: there the target says nothing about x0;"
                " take x0, v, flow or edm"
            )
        time_sampling.check(schedule)
        self.schedule = schedule
        self.parameterization = parameterization
        self.time_sampling = time_sampling
        self.weighting = weighting

    def predict(self, network: Network[C], conditioning: C) -> Predict:
        """The network's output as a function of x_t and t: it is given c_in x_t and c_noise(t)."""

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            return network(self.scaled(x_t, t), self.schedule.c_noise(t).to(x_t).expand(len(x_t)), conditioning)

        return predict

    def scaled(self, x_t: Tensor, t: Tensor) -> Tensor:
        """c_in x_t, as a network is given it, for x_t (B, ...) and t () or (B,)."""
        return self.parameterization.c_in(*self._coefficients(t, x_t)) * x_t

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) eps for x0, eps (B, ...) and t () or (B,)."""
        x0, eps = _wide(x0), _wide(eps)
        alpha, sigma = self._coefficients(t, x0)
        return alpha * x0 + sigma * eps

    def loss(self, predict: Predict, x0: Tensor, eps: Tensor, u: Tensor) -> Tensor:
        """The weighted squared error of each sample, (B,), for x0 and eps (B, ...), u (B,) in (0, 1)."""
        x0, eps = _wide(x0), _wide(eps)
        t = self.time_sampling(u, self.schedule)
        alpha, sigma = self._coefficients(t, x0)
        output = predict(alpha * x0 + sigma * eps, t)
        error = output - self.parameterization.target(x0, eps, alpha, sigma)
        sensitivity = self.parameterization.log_sensitivity(self.schedule.alpha(t), self.schedule.sigma(t))
        weight = self.weighting(self.schedule.logsnr(t), sensitivity).to(x0)
        return weight * error.square().reshape(len(error), -1).mean(1)

    def denoiser(self, predict: Predict) -> Denoise:
        """The function samplers call: x_t (B, ...) and t, () or (B,), to x0_hat (B, ...)."""

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            x_t = _wide(x_t)
            return self.parameterization.x0_hat(_wide(predict(x_t, t)), x_t, *self._coefficients(t, x_t))

        return denoise

    def _coefficients(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t), ready to be multiplied with x."""
        shape = t.shape + (1,) * (x.ndim - t.ndim)
        return self.schedule.alpha(t).to(x).reshape(shape), self.schedule.sigma(t).to(x).reshape(shape)


def _wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()
