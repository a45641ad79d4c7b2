"""Starting from a picture: all of it changed a little, or a part of it painted anew."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from carrara.diffusion.sampler import Denoise


@dataclass(frozen=True)
class Source:
    """A picture to start from (SDEdit, Meng et al. 2022), and where to paint.

    Where the mask keeps the picture, x0_hat is the picture itself at every step, so that any sampler carries it along
    with its noise; outside of it the steps go on as ever.

    Attributes:
        image: (3, R, R) in [−1, 1].
        strength: share of the steps that are made, in (0, 1]; 1 starts from the noise of t = 1.
        mask: (R, R) bool, True where to paint; None paints everywhere.
    """

    image: Tensor
    strength: float
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], but is {self.strength}")

    def rest_of(self, times: Tensor) -> Tensor:
        """The times of the steps that are made, one at least."""
        num_steps = len(times) - 1
        return times[num_steps - max(1, round(self.strength * num_steps)) :]

    def keeping(self, denoise: Denoise, z0: Tensor) -> Denoise:
        """`denoise` with the picture's latents `z0` (B, C, h, w) where the mask keeps them."""
        if self.mask is None:
            return denoise
        # a latent with any pixel to paint is painted
        painted = F.adaptive_max_pool2d(self.mask.to(z0)[None], z0.shape[-2:]) > 0
        return lambda x_t, t: torch.where(painted, denoise(x_t, t), z0.to(x_t.dtype))

    def paste(self, pictures: Tensor) -> Tensor:
        """`pictures` (B, 3, R, R) with the source's own pixels where the mask keeps them."""
        if self.mask is None:
            return pictures
        return torch.where(self.mask.to(pictures.device), pictures, self.image.to(pictures))
