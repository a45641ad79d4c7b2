"""What a sampler may believe of x0_hat: pictures lie in [-1, 1], and strong guidance leads out of it."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from carrara.diffusion.sampler import Denoise


class Thresholding(ABC):
    """x0_hat (B, ...) to one of its shape. Latents have no bounds: for pixels only, but for `Unbounded`."""

    @abstractmethod
    def __call__(self, x0_hat: Tensor) -> Tensor: ...

    def denoiser(self, denoise: Denoise) -> Denoise:
        """A denoiser whose estimates are thresholded."""
        return lambda x_t, t: self(denoise(x_t, t))


class Unbounded(Thresholding):
    """x0_hat as it is."""

    def __call__(self, x0_hat: Tensor) -> Tensor:
        return x0_hat


class Static(Thresholding):
    """Clipped to [-1, 1] (Saharia et al. 2022, "Imagen", section 2.3)."""

    def __call__(self, x0_hat: Tensor) -> Tensor:
        return x0_hat.clamp(-1, 1)


class Dynamic(Thresholding):
    """Clipped to [-s, s] and divided by s, the `quantile` of the sample's |x0_hat| if that is above 1 (ib.)."""

    def __init__(self, quantile: float = 0.995) -> None:
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile must lie in (0, 1], but is {quantile}")
        self.quantile = quantile

    def __call__(self, x0_hat: Tensor) -> Tensor:
        bound = torch.quantile(x0_hat.abs().flatten(1), self.quantile, dim=1).clamp(min=1)
        bound = bound.reshape(-1, *[1] * (x0_hat.ndim - 1))
        return x0_hat.clamp(-bound, bound) / bound
