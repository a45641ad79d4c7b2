"""Text over pictures."""

import math
from dataclasses import dataclass
from functools import cache
from string import ascii_letters, digits

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from carrara import keyed_random
from carrara.corruption.base import Corruption, check_range

_LETTERS = ascii_letters + digits
_SHORTEST, _LONGEST = 2, 8  # letters of a string
_MORE = 16  # strings that are drawn at a time, until every picture has enough
_NEVER = 1 << 40  # a string's number, of pixels that none covers


class Text(Corruption):
    """Random strings of random colour and size at random places (Lehtinen et al. 2018, section 3.2).

    Every pixel is as likely to be covered as any other, and less often than not: the median of its versions is the
    picture's own value, where the mean is grey. Hence absolute errors.

    Args:
        share: of the pixels that are covered, less than a half; strings are added until it is reached.
        seed: see `Corruption`.
    """

    def __init__(self, share: float, seed: int):
        super().__init__(seed)
        check_range("share", share, 0, 0.45)
        self.share = share

    def corrupt(self, images: Tensor, positions: Tensor, purpose: str) -> Tensor:
        batch, _, height, width = images.shape
        places, side = height * width, min(height, width)
        alphabet = _alphabet(max(8, side // 16), max(12, side // 6), images.device)
        first = torch.full((batch, places), _NEVER, device=images.device)  # the string that covers a pixel first
        strings: list[Tensor] = []
        pixels: list[Tensor] = []
        colors: list[Tensor] = []
        while not strings or bool(((first < _NEVER).sum(1) < self.share * places).any()):
            u = keyed_random.uniform(self.seed, positions, f"{purpose}/{len(strings)}", (_MORE, _LONGEST + 7))
            string, pixel = _written(alphabet, u, height, width)
            strings.append(string + _MORE * len(strings))
            pixels.append(pixel)
            colors.append(_whole(u[..., -3:], 256))
            first.view(-1).scatter_reduce_(0, pixel, strings[-1], "amin")
        string, pixel, color = torch.cat(strings), torch.cat(pixels), torch.cat(colors, 1)

        added = torch.zeros(batch, color.shape[1] + 1, dtype=torch.long, device=images.device)  # pixels, by each string
        added.scatter_add_(1, first.clamp_max(color.shape[1]), torch.ones_like(first))
        last = (added.cumsum(1) >= self.share * places).int().argmax(1)
        shown = string <= last[pixel // places]
        top = torch.full((batch * places,), -1, device=images.device)  # of strings on one another the last is seen
        top = top.scatter_reduce_(0, pixel[shown], string[shown], "amax").view(batch, 1, places)
        levels = color.mT.gather(2, top.clamp_min(0).expand(-1, 3, -1))
        return torch.where(top >= 0, levels.to(images.dtype) / 127.5 - 1, images.flatten(2)).view_as(images)

    def distance(self, answer: Tensor, target: Tensor) -> Tensor:
        return (answer - target).abs()

    def excess(self, answer: Tensor) -> Tensor:
        """Of E|answer − noisy| = (1 − c) |answer − clean| + c E|answer − colour| the last term, but for c / 2.

        c of the pixels are covered, by colours that are uniform in [−1, 1]. It draws to grey what a network answers
        where it does not know what the text covers; Lehtinen et al. leave it in.
        """
        from_colors = F.huber_loss(answer, torch.zeros_like(answer), reduction="none")
        return _coverage(self.share, *answer.shape[2:]) * from_colors


@cache
def _coverage(share: float, height: int, width: int) -> float:
    """The part of all pixels that is covered on average; the last string goes beyond the share."""
    blank = torch.full((64, 3, height, width), 2.0)  # no colour is 2
    return float((Text(share, 0).corrupt(blank, torch.arange(64), "coverage")[:, 0] != 2.0).float().mean())


def _whole(u: Tensor, count: int | Tensor) -> Tensor:
    """Uniform numbers in (0, 1) as whole ones from 0 to count − 1."""
    return (u * count).long()


@dataclass
class _Alphabet:
    """The letters of Pillow's own font in some sizes: glyph g = size's number · letters + letter.

    Attributes:
        rows, columns: of every pixel that is ink, glyph after glyph, int64.
        start, count: (glyphs,) where a glyph's pixels begin, and their number.
        width: (glyphs,) in pixels.
        height: (sizes,) of a line.
    """

    rows: Tensor
    columns: Tensor
    start: Tensor
    count: Tensor
    width: Tensor
    height: Tensor


def _written(alphabet: _Alphabet, u: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Strings as pixels: of each, the string's number in its picture, and the place among all pixels of the batch.

    Args:
        u: (B, strings, letters + 4 and more) uniform numbers: the letters', the size, the length and the place.
    """
    batch, strings, _ = u.shape
    of_size, of_length, of_top, of_left = u[..., _LONGEST : _LONGEST + 4].unbind(-1)
    size = _whole(of_size, len(alphabet.height))
    length = _SHORTEST + _whole(of_length, _LONGEST - _SHORTEST + 1)
    glyph = size[..., None] * len(_LETTERS) + _whole(u[..., :_LONGEST], len(_LETTERS))
    is_letter = torch.arange(_LONGEST, device=u.device) < length[..., None]
    advance = alphabet.width[glyph] * is_letter
    end = advance.cumsum(2)
    tall, wide = alphabet.height[size], end[..., -1]
    # It may stick out on either side, but not all of it.
    top = 1 - tall + _whole(of_top, tall + height - 1)
    left = 1 - wide + _whole(of_left, wide + width - 1)

    ink = (alphabet.count[glyph] * is_letter).flatten()
    letter = torch.repeat_interleave(ink)  # of every pixel, the letter's number among all of the batch
    start = alphabet.start[glyph].flatten() - (ink.cumsum(0) - ink)
    place = start[letter] + torch.arange(len(letter), device=u.device)
    row = top.repeat_interleave(_LONGEST)[letter] + alphabet.rows[place]
    column = (left[..., None] + end - advance).flatten()[letter] + alphabet.columns[place]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    of_picture = torch.arange(batch, device=u.device).repeat_interleave(strings * _LONGEST) * (height * width)
    pixel = (of_picture[letter] + row * width + column)[inside]
    string = torch.arange(strings, device=u.device).repeat_interleave(_LONGEST).repeat(batch)[letter[inside]]
    return string, pixel


@cache
def _alphabet(smallest: int, largest: int, device: torch.device) -> _Alphabet:
    """Drawn once: Pillow takes far longer for a string than it takes to put it together from them."""
    inks, widths, heights = [], [], []
    for size in range(smallest, largest + 1):
        font = ImageFont.load_default(size)
        _, top, _, bottom = (int(edge) for edge in font.getbbox(_LETTERS))
        heights.append(bottom - top)
        for letter in _LETTERS:
            image = Image.new("1", (math.ceil(font.getlength(letter)), bottom - top))
            draw = ImageDraw.Draw(image)
            draw.fontmode = "1"  # a pixel is covered or not
            draw.text((0, -top), letter, fill=1, font=font)
            inks.append(np.argwhere(np.asarray(image)))
            widths.append(image.width)
    counts = [len(ink) for ink in inks]
    rows, columns = np.concatenate(inks).T
    starts = np.cumsum([0, *counts[:-1]])
    return _Alphabet(*(torch.as_tensor(x, device=device) for x in (rows, columns, starts, counts, widths, heights)))
