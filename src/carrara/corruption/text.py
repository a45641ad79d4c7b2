"""Text over pictures."""

import hashlib
import string
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from carrara.corruption.base import Corruption, check_range

_LETTERS = list(string.ascii_letters + string.digits)


class Text(Corruption):
    """Random strings of random colour and size at random places (Lehtinen et al. 2018, section 3.2).

    Every pixel is as likely to be covered as any other, and less often than not: the median of its versions is the
    picture's own value, where the mean is grey.

    Args:
        share: of the pixels that are covered, less than a half; strings are added until it is reached.
        seed: see `Corruption`.
    """

    unmoved = "median"

    def __init__(self, share: float, seed: int):
        super().__init__(seed)
        check_range("share", share, 0, 0.45)
        self.share = share

    def corrupt(self, images: Tensor, positions: Tensor, purpose: str) -> Tensor:
        drawn = [self._overlay(position, purpose, *images.shape[2:]) for position in positions.tolist()]
        colors, covered = (torch.from_numpy(np.stack(arrays)).to(images.device) for arrays in zip(*drawn, strict=True))
        return torch.where(covered[:, None], colors.permute(0, 3, 1, 2).to(images.dtype) / 127.5 - 1, images)

    def _overlay(
        self, position: int, purpose: str, height: int, width: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Colours (H, W, 3), and where they cover the picture (H, W)."""
        key = hashlib.sha256(f"{self.seed}/{position}/{purpose}".encode()).digest()
        random = np.random.default_rng(list(key))
        colors, covered = Image.new("RGB", (width, height)), Image.new("1", (width, height))
        side = min(height, width)
        while np.asarray(covered).mean() < self.share:
            font = _font(int(random.integers(max(8, side // 16), max(12, side // 6) + 1)))
            word = "".join(random.choice(_LETTERS, size=random.integers(2, 9)))
            color = tuple(random.integers(0, 256, size=3).tolist())
            left, top, right, bottom = (int(edge) for edge in font.getbbox(word))
            place = (int(random.integers(1 - right, width - left)), int(random.integers(1 - bottom, height - top)))
            letters = Image.new("1", (width, height))
            draw = ImageDraw.Draw(letters)
            draw.fontmode = "1"  # a pixel is covered or not
            draw.text(place, word, fill=1, font=font)
            colors.paste(color, mask=letters)
            covered.paste(1, mask=letters)
        return np.asarray(colors), np.asarray(covered)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own."""
    return ImageFont.load_default(size)
