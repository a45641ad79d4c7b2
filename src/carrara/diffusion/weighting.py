"""How much the squared error counts at each noise level."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from carrara.diffusion.parameterization import Parameterization


class LossWeighting(ABC):
    """Gives each sample's squared error on the parameterization's target a weight."""

    @abstractmethod
    def __call__(self, logsnr: Tensor, parameterization: Parameterization) -> Tensor:
        """Weights >= 0, the shape of logsnr."""


class Unweighted(LossWeighting):
    """The plain mean squared error on the target: for epsilon, DDPM's L_simple (Ho et al. 2020, eq. 14)."""

    def __call__(self, logsnr: Tensor, parameterization: Parameterization) -> Tensor:
        return torch.ones_like(logsnr)


class MinSNR(LossWeighting):
    """min(SNR, gamma) on the x0 loss, put in terms of the target (Hang et al. 2023, section 3.4).

    That is min(SNR, gamma)/SNR for epsilon, /(SNR + 1) for v and /(sqrt(SNR) + 1)^2 for flow.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if gamma <= 0:
            raise ValueError(f"gamma must be positive, but is {gamma}")
        self.gamma = gamma

    def __call__(self, logsnr: Tensor, parameterization: Parameterization) -> Tensor:
        return (logsnr.clamp(max=math.log(self.gamma)) + parameterization.log_sensitivity(logsnr)).exp()
