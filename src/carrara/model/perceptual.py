"""Features in which two pictures that look alike lie close together."""

from pathlib import Path

import torch
from torch import Tensor, nn

from carrara.errors import UserError

VGG16_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/vgg16.pt"


class Perceptual(nn.Module):
    """LPIPS features of VGG16 (Zhang et al. 2018) from a local TorchScript file; nothing is downloaded.

    Args:
        path: a copy of `VGG16_URL`.

    Raises:
        UserError: the file is missing or is no TorchScript network.
    """

    def __init__(self, path: str):
        super().__init__()
        if not Path(path).is_file():
            raise UserError(f"model.perceptual={path}: no such file; download {VGG16_URL}, or set it to null")
        try:
            self.network = torch.jit.load(path, map_location="cpu").eval()
        except RuntimeError:
            raise UserError(f"model.perceptual={path} is no TorchScript network; download {VGG16_URL}") from None

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS (B,) between images (B, 3, H, W) in [−1, 1]."""
        with torch.autocast(a.device.type, enabled=False):
            fa, fb = (self.network((x.float() + 1) * 127.5, resize_images=False, return_lpips=True) for x in (a, b))
        return (fa - fb).square().sum(1)
