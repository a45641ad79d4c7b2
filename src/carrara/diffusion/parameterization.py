"""What the network predicts, and how x0 and eps follow from it when x_t = alpha x0 + sigma eps.

alpha and sigma are tensors that broadcast against x_t, of any schedule: alpha^2 + sigma^2 need not be 1.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class Parameterization(ABC):
    """A target the network learns; `x0_hat` and `eps_hat` are exact inverses of `target`."""

    name: ClassVar[str]
    singular_at_zero_snr: ClassVar[bool] = False  # x0_hat divides by alpha

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network should output, the shape of x0."""

    @abstractmethod
    def x0_hat(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The estimate of x0 that the network's output means."""

    @abstractmethod
    def eps_hat(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The estimate of eps that the network's output means."""

    @abstractmethod
    def log_sensitivity(self, logsnr: Tensor) -> Tensor:
        """log |d x0_hat / d output|^2, which turns a weight of the x0 loss into one of this target's loss."""


class Epsilon(Parameterization):
    """The noise (Ho et al. 2020, eq. 14)."""

    name = "epsilon"
    singular_at_zero_snr = True

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return eps

    def x0_hat(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * output) / alpha

    def eps_hat(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return output

    def log_sensitivity(self, logsnr: Tensor) -> Tensor:
        return -logsnr


class X0(Parameterization):
    """The clean picture. `eps_hat` needs sigma > 0."""

    name = "x0"

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x0

    def x0_hat(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return output

    def eps_hat(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - alpha * output) / sigma

    def log_sensitivity(self, logsnr: Tensor) -> Tensor:
        return torch.zeros_like(logsnr)


class V(Parameterization):
    """v = (alpha eps - sigma x0) / r with r^2 = alpha^2 + sigma^2 (Salimans & Ho 2022, section 4, r = 1).

    The division by r makes v a quarter turn of x_t / r whatever the schedule.
    """

    name = "v"

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha * eps - sigma * x0) / torch.hypot(alpha, sigma)

    def x0_hat(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        r = torch.hypot(alpha, sigma)
        return alpha / r**2 * x_t - sigma / r * output

    def eps_hat(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        r = torch.hypot(alpha, sigma)
        return sigma / r**2 * x_t + alpha / r * output

    def log_sensitivity(self, logsnr: Tensor) -> Tensor:
        return logsigmoid(-logsnr)  # 1 / (SNR + 1)


class Flow(Parameterization):
    """flow = eps - x0, the velocity dx_t/dt of the straight line (Liu et al. 2022, eq. 1)."""

    name = "flow"

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return eps - x0

    def x0_hat(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * output) / (alpha + sigma)

    def eps_hat(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t + alpha * output) / (alpha + sigma)

    def log_sensitivity(self, logsnr: Tensor) -> Tensor:
        return 2 * logsigmoid(-logsnr / 2)  # 1 / (sqrt(SNR) + 1)^2
