"""Pictures made smaller and larger."""

import torch.nn.functional as F
from torch import Tensor


def shrink(images: Tensor, factor: int) -> Tensor:
    """Pictures (B, C, H, W) -> (B, C, H / factor, W / factor): the mean of each square.

    Raises:
        ValueError: the factor does not divide the sides.
    """
    if images.shape[-2] % factor or images.shape[-1] % factor:
        raise ValueError(f"pictures of {tuple(images.shape[-2:])} cannot be shrunk by {factor}")
    return F.avg_pool2d(images, factor)


def enlarge(images: Tensor, factor: int) -> Tensor:
    """Pictures (B, C, h, w) -> (B, C, factor · h, factor · w), bicubic; at edges it overshoots their range a little.

    It is the Pillow library's kernel (Keys 1981, a = −1/2), which torch takes with `antialias` alone.
    """
    return F.interpolate(images, scale_factor=float(factor), mode="bicubic", antialias=True)
