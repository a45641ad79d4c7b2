"""What the network predicts. Every target is a combination of x0 and eps, from which both follow.

alpha and sigma, of x_t = alpha x0 + sigma eps, are tensors that broadcast against x_t, of any schedule:
alpha^2 + sigma^2 need not be 1.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class Parameterization(ABC):
    """A target a x0 + b eps. With x_t, that makes two equations for x0 and eps, with determinant alpha b - sigma a."""

    name: ClassVar[str]

    @abstractmethod
    def weights(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """a and b, of the shape of alpha and sigma."""

    def c_in(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The scale of x_t as the network receives it."""
        return torch.ones_like(alpha)

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network should output, the shape of x0."""
        a, b = self.weights(alpha, sigma)
        return a * x0 + b * eps

    def x0_hat(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The estimate of x0 that the network's output means."""
        _, b = self.weights(alpha, sigma)
        determinant = self.determinant(alpha, sigma)
        return b / determinant * x_t - sigma / determinant * output

    def eps_hat(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The estimate of eps that the network's output means."""
        a, _ = self.weights(alpha, sigma)
        determinant = self.determinant(alpha, sigma)
        return alpha / determinant * output - a / determinant * x_t

    def determinant(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Zero where target and x_t say the same, and so nothing about x0."""
        a, b = self.weights(alpha, sigma)
        return alpha * b - sigma * a

    def log_sensitivity(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log |d x0_hat / d output|^2, which turns a weight of the x0 loss into one of this target's loss."""
        return 2 * (sigma.log() - self.determinant(alpha, sigma).abs().log())


class Epsilon(Parameterization):
    """The noise (Ho et al. 2020, eq. 14)."""

    name = "epsilon"

    def weights(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), torch.ones_like(sigma)


class X0(Parameterization):
    """The clean picture."""

    name = "x0"

    def weights(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(alpha), torch.zeros_like(sigma)


class V(Parameterization):
    """v = (alpha eps - sigma x0) / r with r^2 = alpha^2 + sigma^2 (Salimans & Ho 2022, section 4, r = 1).

    The division by r makes v a quarter turn of x_t / r whatever the schedule.
    """

    name = "v"

    def weights(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        r = torch.hypot(alpha, sigma)
        return -sigma / r, alpha / r


class Flow(Parameterization):
    """flow = eps - x0, the velocity dx_t/dt of the straight line (Liu et al. 2022, eq. 1)."""

    name = "flow"

    def weights(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(alpha), torch.ones_like(sigma)


class Score(Parameterization):
    """The score of q(x_t | x0), -eps / sigma: denoising score matching (Vincent 2011; Song & Ermon 2019, eq. 5).

    Its square grows as 1 / sigma^2: `weighting.Noise` makes all noise levels count alike.
    """

    name = "score"

    def weights(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), -1 / sigma


class EDM(Parameterization):
    """x0_hat = c_skip x_t + c_out output, and the network receives c_in x_t (Karras et al. 2022, table 1).

    Input and target have unit variance if x0 has `sigma_data`. For any schedule c_skip, c_out and c_in are the paper's
    for x_t / alpha and its noise sigma / alpha, multiplied out. With sigma_data = 1 the target is -v.
    """

    name = "edm"

    def __init__(self, sigma_data: float = 0.5) -> None:
        if sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, but is {sigma_data}")
        self.sigma_data = sigma_data

    def c_in(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return 1 / torch.hypot(alpha * self.sigma_data, sigma)

    def weights(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        # (x0 - c_skip x_t) / c_out with c_skip = alpha sigma_data^2 c_in^2 and c_out = sigma sigma_data c_in
        c_in = self.c_in(alpha, sigma)
        return sigma / self.sigma_data * c_in, -alpha * self.sigma_data * c_in
