"""Peak signal-to-noise ratio of reconstructions."""

import torch
from torch import Tensor

from carrara.metric.float64_metric import Float64Metric


def to_8_bit(images: Tensor) -> Tensor:
    """Float images in [−1, 1] rounded to the 256 levels of a file, or uint8 ones as they are; float64."""
    if images.dtype == torch.uint8:
        return images.double()
    if not images.is_floating_point():
        raise ValueError(f"images must be uint8 or float in [-1, 1], not {images.dtype}")
    return ((images.double() + 1) * 127.5).round().clamp(0, 255)


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """10 log10(255² / MSE) of each image in dB, float64 (B,), after rounding to 8 bits; (B, C, H, W) each.

    Equal images would be infinite: the least error taken is that of one value off by one level, so a perfect
    reconstruction of 3×32×32 scores 83 dB.
    """
    if images.shape != references.shape:
        raise ValueError(f"images {tuple(images.shape)} and references {tuple(references.shape)} differ in shape")
    error = (to_8_bit(images) - to_8_bit(references)).square().flatten(1)
    return 10 * torch.log10(255.0**2 / error.mean(dim=1).clamp_min(1 / error.shape[1]))


class PSNR(Float64Metric):
    """Mean over images of `psnr`."""

    higher_is_better: bool | None = True
    decibel_sum: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("decibel_sum")
        self.add_sum("count")

    def update(self, images: Tensor, references: Tensor) -> None:
        """Add reconstructions and originals (B, C, H, W), each uint8 or float in [−1, 1]."""
        self.decibel_sum = self.decibel_sum + psnr(images, references).sum()
        self.count = self.count + len(images)

    def compute(self) -> Tensor:
        """The mean in dB, a float64 scalar; nan before any image."""
        return torch.as_tensor(self.decibel_sum / self.count)
