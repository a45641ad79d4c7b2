"""Strings that are drawn for a whole batch at once, against Pillow, which draws one letter at a time."""

import math
from string import ascii_letters, digits

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from carrara import keyed_random
from carrara.corruption.text import Text

LETTERS = ascii_letters + digits


def one_by_one(share: float, position: int, height: int, width: int) -> NDArray[np.uint8]:
    """(H, W, 3): strings on white, each over those before, until they cover the share."""
    sizes = range(max(8, min(height, width) // 16), max(12, min(height, width) // 6) + 1)
    picture, covered = np.full((height, width, 3), 255, dtype=np.uint8), np.zeros((height, width), dtype=np.bool_)
    for block in range(100):
        u = keyed_random.uniform(7, torch.tensor([position]), f"x/{block}", (16, 15))[0].double().tolist()
        for row in u:
            if covered.mean() >= share:
                return picture
            font = ImageFont.load_default(sizes[int(row[8] * len(sizes))])
            letters = [LETTERS[int(u * len(LETTERS))] for u in row[: 2 + int(row[9] * 7)]]
            widths = [math.ceil(font.getlength(letter)) for letter in letters]
            _, above, _, below = font.getbbox(LETTERS)
            tall, wide = int(below - above), sum(widths)
            top = 1 - tall + int(row[10] * (tall + height - 1))
            left = 1 - wide + int(row[11] * (wide + width - 1))
            page = Image.new("1", (width + 2 * wide, height + 2 * tall))  # with a margin, which is cut off
            for k, letter in enumerate(letters):
                cell = Image.new("1", (widths[k], tall))
                draw = ImageDraw.Draw(cell)
                draw.fontmode = "1"
                draw.text((0, -above), letter, fill=1, font=font)
                page.paste(cell, (wide + left + sum(widths[:k]), tall + top))
            ink = np.asarray(page)[tall : tall + height, wide : wide + width]
            covered |= ink
            picture[ink] = [int(256 * u) for u in row[12:]]
    raise AssertionError("the share is not reached")


@pytest.mark.parametrize(("height", "width"), [(64, 64), (24, 40), (100, 80), (8, 8)])
@pytest.mark.parametrize("share", [0.01, 0.25, 0.45])
def test_it_is_the_strings_one_by_one(share, height, width):
    positions = torch.tensor([5, -(2**62), 3])
    found = Text(share, 7).corrupt(torch.ones(3, 3, height, width), positions, "x")
    levels = ((found + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for picture, position in zip(levels, positions.tolist(), strict=True):
        assert np.array_equal(picture, one_by_one(share, position, height, width))
