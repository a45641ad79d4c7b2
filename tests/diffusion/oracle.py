"""Distributions whose denoiser E[x0 | x_t] is known in closed form, every schedule and every target."""

from collections.abc import Callable

import torch
from torch import Tensor

from carrara.diffusion import parameterization
from carrara.diffusion.schedule import EDM, Cosine, Flow, NoiseSchedule, Sigmoid, VarianceExploding
from carrara.diffusion.schedule_table import CosineTable, Linear, ScaledLinear, ZeroTerminalSNR

MEAN, STD = 0.5, 0.5
# a mixture of two Gaussians in the plane
MODES = torch.tensor([[-1.0, 0.5], [1.0, -0.5]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
WIDTH = 0.1

SCHEDULES: dict[str, NoiseSchedule] = {
    "linear": Linear(),
    "scaled_linear": ScaledLinear(),
    "cosine": Cosine(),
    "cosine_table": CosineTable(),
    "sigmoid": Sigmoid(),
    "zero_terminal_snr": ZeroTerminalSNR(ScaledLinear()),
    "flow": Flow(),
    "shifted_flow": Flow(shift=3),
    "edm": EDM(),
    "variance_exploding": VarianceExploding(),
}
TARGETS = [
    parameterization.Epsilon(),
    parameterization.X0(),
    parameterization.V(),
    parameterization.Flow(),
    parameterization.Score(),
    parameterization.EDM(sigma_data=0.5),
]

Denoise = Callable[[Tensor, Tensor], Tensor]


def is_singular(schedule: NoiseSchedule, target: parameterization.Parameterization) -> bool:
    """Pairs that are refused when built."""
    return schedule.terminal_snr_is_zero and target.name in ("epsilon", "score")


def gaussian(schedule: NoiseSchedule) -> Denoise:
    """E[x0 | x_t] for x0 ~ N(MEAN, STD^2) of every element."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        a, s = schedule.alpha(t), schedule.sigma(t)
        return MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MEAN)

    return denoise


def mixture(schedule: NoiseSchedule) -> Denoise:
    """E[x0 | x_t] for x0 (N, 2) ~ 0.3 N(MODES[0], WIDTH^2) + 0.7 N(MODES[1], WIDTH^2)."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        a, s = schedule.alpha(t), schedule.sigma(t)
        variance = a**2 * WIDTH**2 + s**2
        from_mode = x[:, None] - a * MODES
        share = (WEIGHTS.log() - from_mode.square().sum(-1) / (2 * variance)).softmax(-1)[..., None]
        return (share * (MODES + a * WIDTH**2 / variance * from_mode)).sum(1)

    return denoise


def draw_mixture(n: int) -> Tensor:
    """(n, 2) of it."""
    mode = MODES[(torch.rand(n, dtype=torch.float64) < WEIGHTS[1]).long()]
    return mode + WIDTH * torch.randn(n, 2, dtype=torch.float64)


class ExactNoise:
    """Noise with mean 0 and variance 1 and no correlation with x, now and a step ago, exactly, in the sample.

    A Gaussian's denoiser is affine, so the sample's mean and variance are then those of infinitely many.
    """

    def __init__(self, denoise: Denoise, x: Tensor) -> None:
        self.denoise = denoise
        self.seen = [x]

    def watch(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen = [*self.seen[-1:], x]
        return self.denoise(x, t)

    def __call__(self) -> Tensor:
        return exact(torch.randn_like(self.seen[-1]), *self.seen)


def exact(noise: Tensor, *others: Tensor) -> Tensor:
    """`noise` (N,) with mean 0 and variance 1 and no correlation with the others."""
    noise = noise - noise.mean()
    if others:
        basis = torch.linalg.qr(torch.stack([x - x.mean() for x in others], dim=1)).Q
        noise = noise - basis @ (basis.T @ noise)
        noise = noise - noise.mean()  # of two others that are almost the same, the second direction is rounding
    return noise / noise.std(correction=0)
