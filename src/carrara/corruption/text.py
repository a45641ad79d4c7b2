"""Text over pictures."""

import hashlib
import math
import string
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from carrara.corruption.base import Corruption, check_range

_LETTERS = string.ascii_letters + string.digits


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
        colors, covered = np.zeros((height, width, 3), dtype=np.uint8), np.zeros((height, width), dtype=np.bool_)
        side = min(height, width)
        while np.count_nonzero(covered) < self.share * covered.size:
            glyphs = _glyphs(int(random.integers(max(8, side // 16), max(12, side // 6) + 1)))
            letters = random.integers(0, len(glyphs), size=random.integers(2, 9)).tolist()
            word = np.concatenate([glyphs[letter] for letter in letters], axis=1)
            top, left = (int(random.integers(1 - k, n)) for k, n in zip(word.shape, (height, width), strict=True))
            word = word[max(0, -top) : height - top, max(0, -left) : width - left]
            top, left = max(0, top), max(0, left)
            place = slice(top, top + word.shape[0]), slice(left, left + word.shape[1])
            covered[place] |= word
            colors[place][word] = random.integers(0, 256, size=3)
        return colors, covered


@cache
def _glyphs(size: int) -> list[NDArray[np.bool_]]:
    """The letters of Pillow's own font as bitmaps, as high as the line and as wide as each is.

    Drawn once: for a string, Pillow takes five times as long as it takes to put it together from them.
    """
    font = ImageFont.load_default(size)
    _, top, _, bottom = (int(edge) for edge in font.getbbox(_LETTERS))
    glyphs = []
    for letter in _LETTERS:
        image = Image.new("1", (math.ceil(font.getlength(letter)), bottom - top))
        draw = ImageDraw.Draw(image)
        draw.fontmode = "1"  # a pixel is covered or not
        draw.text((0, -top), letter, fill=1, font=font)
        glyphs.append(np.asarray(image))
    return glyphs
