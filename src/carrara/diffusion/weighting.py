"""How much the squared error counts at each noise level."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class LossWeighting(ABC):
    """Gives each sample's squared error on the network's target a weight."""

    @abstractmethod
    def __call__(self, logsnr: Tensor, log_sensitivity: Tensor) -> Tensor:
        """Weights >= 0, the shape of logsnr.

        Args:
            logsnr: of the sample's time.
            log_sensitivity: `Parameterization.log_sensitivity` there: log |d x0_hat / d output|^2.
        """


class Unweighted(LossWeighting):
    """The plain mean squared error on the target: for epsilon, DDPM's L_simple (Ho et al. 2020, eq. 14)."""

    def __call__(self, logsnr: Tensor, log_sensitivity: Tensor) -> Tensor:
        return torch.ones_like(logsnr)


class SameForAllTargets(LossWeighting):
    """A weight of the x0 loss, put in terms of the target: what counts is then the same whatever the target.

    All but EDM's fall to 0 with the SNR: with a zero terminal SNR, t = 1 itself, where a sampler starts, is then not
    learned.
    """

    @abstractmethod
    def log_x0_weight(self, logsnr: Tensor) -> Tensor:
        """log of the weight of |x0_hat - x0|^2; that of |eps_hat - eps|^2 is SNR times smaller."""

    def __call__(self, logsnr: Tensor, log_sensitivity: Tensor) -> Tensor:
        return (self.log_x0_weight(logsnr) + log_sensitivity).exp()


class Noise(SameForAllTargets):
    """1 on the epsilon loss: for the score that is sigma^2, the choice of NCSN (Song & Ermon 2019, section 4.2)."""

    def log_x0_weight(self, logsnr: Tensor) -> Tensor:
        return logsnr


class MinSNR(SameForAllTargets):
    """min(SNR, gamma) on the x0 loss (Hang et al. 2023, section 3.4).

    That is min(SNR, gamma)/SNR for epsilon, /(SNR + 1) for v and /(sqrt(SNR) + 1)^2 for flow.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if gamma <= 0:
            raise ValueError(f"gamma must be positive, but is {gamma}")
        self.gamma = gamma

    def log_x0_weight(self, logsnr: Tensor) -> Tensor:
        return logsnr.clamp(max=math.log(self.gamma))


class EDM(SameForAllTargets):
    """SNR + 1 / sigma_data^2 on the x0 loss, 1 on the EDM target's (Karras et al. 2022, table 1, lambda)."""

    def __init__(self, sigma_data: float = 0.5) -> None:
        if sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, but is {sigma_data}")
        self.sigma_data = sigma_data

    def log_x0_weight(self, logsnr: Tensor) -> Tensor:
        return torch.logaddexp(logsnr, torch.full_like(logsnr, -2 * math.log(self.sigma_data)))


class Sigmoid(SameForAllTargets):
    """sigmoid(bias - logsnr) on the epsilon loss (VDM++, Kingma & Gao 2023, table 1 and section 3).

    The paper's w is this weight times the density of the times' logsnr.
    """

    def __init__(self, bias: float = 2.0) -> None:
        self.bias = bias

    def log_x0_weight(self, logsnr: Tensor) -> Tensor:
        return self.bias + logsigmoid(logsnr - self.bias)  # = logsnr + logsigmoid(bias - logsnr), also at infinity


class P2(SameForAllTargets):
    """1 / (k + SNR)^gamma on the epsilon loss (Choi et al. 2022, eq. 9): less where a picture is nearly finished."""

    def __init__(self, k: float = 1.0, gamma: float = 1.0) -> None:
        if k <= 0 or gamma < 0:
            raise ValueError(f"k must be positive and gamma not negative, but they are {k} and {gamma}")
        self.k = k
        self.gamma = gamma

    def log_x0_weight(self, logsnr: Tensor) -> Tensor:
        return logsnr - self.gamma * torch.logaddexp(logsnr, torch.full_like(logsnr, math.log(self.k)))
