"""Encoded bytes to pictures and captions. Pure functions; what is wrong with the bytes is a DecodeError."""

import io
import json
import math
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Crop = Literal["center", "random", "none"]

_FORMATS = ("JPEG", "PNG", "WEBP")  # no others: Pillow would start Ghostscript for an EPS named .jpg
_ORIENTATION = 0x0112  # the EXIF tag
_TRANSPOSE: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_SWAPPING = {
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
}


class DecodeError(Exception):
    """A sample that cannot be used; `reason` is one word for the counts."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode_image(
    data: bytes,
    size: int | tuple[int, int],
    crop: Crop = "center",
    u: Sequence[float] = (0.5, 0.5),
    max_pixels: int = 64_000_000,
) -> NDArray[np.uint8]:
    """JPEG, PNG or WebP to (3, H, W) uint8 RGB, where `size` is (H, W), or R for a square.

    The largest part of that shape, at the centre or where `u` (horizontal, vertical in [0, 1)) says, is resized
    with antialiased bicubic; `none` squeezes the whole picture. A picture of that size is copied. EXIF rotation is
    applied, 16-bit grey scaled, transparency laid on white. JPEGs are shrunk by 2, 4 or 8 while they are
    decoded, as long as H and W pixels remain. Of animations the first picture is taken.

    Raises DecodeError: not_an_image, broken_image, too_many_pixels (by the header, before decoding).
    """
    with warnings.catch_warnings(action="ignore"):  # Pillow's, on bombs and damaged EXIF blocks
        return _decode(data, (size, size) if isinstance(size, int) else size, crop, u, max_pixels)


def picture_size(data: bytes) -> tuple[int, int]:
    """Height and width as a viewer shows it, by the header alone; (0, 0) of what is no picture."""
    try:
        with warnings.catch_warnings(action="ignore"):
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            turned = _orientation(image) in _SWAPPING
    except Exception:  # as below: Pillow's parsers raise what they like
        return 0, 0
    return (image.width, image.height) if turned else (image.height, image.width)


def _decode(data: bytes, target: tuple[int, int], crop: Crop, u: Sequence[float], max_pixels: int) -> NDArray[np.uint8]:
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        raise DecodeError("too_many_pixels") from None
    except Exception:  # Pillow's parsers raise whatever their struct, zlib and index operations do
        raise DecodeError("not_an_image") from None
    if image.width * image.height > max_pixels:
        raise DecodeError("too_many_pixels")
    try:
        if image.format == "PNG":  # Pillow does not look at the checksums of pixels by itself
            image.verify()
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        orientation = _orientation(image)
        width, height = image.size
        scale = 1.0
        height_out, width_out = target
        if orientation is None:  # a drafted picture may end within its last pixel, which turning would put first
            drafted = image.draft(None, (width_out, height_out))  # JPEG only; both sides stay at least these
            scale = width / drafted[1][2] if drafted else 1.0
        image.load()
        if orientation is not None:
            image = image.transpose(orientation)
            width, height = image.size
    except Exception:  # Pillow's readers raise what they like on hostile bytes: OSError, SyntaxError, struct.error, …
        raise DecodeError("broken_image") from None
    left, top, right, bottom = (edge / scale for edge in _box(width, height, target, crop, u))
    outer = (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))
    rgb = _rgb(image.crop(outer))
    box = (left - outer[0], top - outer[1], right - outer[0], bottom - outer[1])
    if box != (0, 0, width_out, height_out):
        rgb = rgb.resize((width_out, height_out), Image.Resampling.BICUBIC, box)
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """What turns the picture upright, None if it is."""
    try:
        return _TRANSPOSE.get(image.getexif().get(_ORIENTATION))
    except Exception:  # a damaged EXIF block is no reason to lose the picture
        return None


def _box(width: int, height: int, target: tuple[int, int], crop: Crop, u: Sequence[float]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in whole pixels."""
    if crop == "none":
        return 0, 0, width, height
    high, wide = target
    if width * high >= height * wide:  # wider than the target
        box_width, box_height = max(1, round(height * wide / high)), height
    else:
        box_width, box_height = width, max(1, round(width * high / wide))
    if crop == "center":
        left, top = (width - box_width) // 2, (height - box_height) // 2
    else:
        left, top = math.floor((width - box_width + 1) * u[0]), math.floor((height - box_height + 1) * u[1])
    return left, top, left + box_width, top + box_height


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB."""
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's convert would clip at 255
        grey = np.asarray(image).astype(np.int64)
        key = image.info.get("transparency")
        white = grey == key if isinstance(key, int) else np.zeros_like(grey, dtype=bool)
        scaled = np.where(white, 255, (grey.clip(0, 65535) * 255 + 32767) // 65535)
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    colour = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB")


def decode_caption(data: bytes, key: str | None = None) -> str:
    """UTF-8 text, or the text under `key` of a JSON object; without NULs and with single spaces.

    Bytes that are no UTF-8, and halves of surrogate pairs, which JSON can spell, become U+FFFD. Raises DecodeError:
    no_caption, if the JSON has no text there.
    """
    text = data.decode("utf-8", "replace")
    if key is not None:
        try:
            text = json.loads(data)[key]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DecodeError("no_caption") from None
        if not isinstance(text, str):
            raise DecodeError("no_caption")
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return " ".join(text.replace("\0", "").removeprefix("\ufeff").split())
