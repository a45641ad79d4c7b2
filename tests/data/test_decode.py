"""Bytes to pictures: Pillow's surprises (trap 8), crops, and damaged data."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from carrara.data.decode import DecodeError, decode_caption, decode_image

RAMP = (np.arange(48 * 64, dtype=np.uint32) * 37 % 251).astype(np.uint8).reshape(48, 64)  # height 48, width 64


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(height, width, detail=6):
    """A (height, width, 3) picture with `detail` blobs along a side."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (detail, detail, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bit_depth, colour, rows, extra=b""):
    """A PNG from raw rows; colour 0 grey, 2 RGB, 4 grey and alpha."""
    raw = b"".join(b"\0" + row for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return signature + body


def close(image, colour, tolerance=1):
    """All pixels of (3, R, R) have this colour."""
    return np.abs(image.astype(int) - np.reshape(colour, (3, 1, 1))).max() <= tolerance


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_a_square_of_the_right_size_is_copied(format):
    pixels = picture(32, 32)
    image = decode_image(encode(Image.fromarray(pixels), format, lossless=True), 32)
    assert image.dtype == np.uint8 and image.flags.c_contiguous
    np.testing.assert_array_equal(image, pixels.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("crop", "u", "left", "top"),
    [
        ("center", (0.9, 0.9), 8, 0),
        ("random", (0.0, 0.0), 0, 0),
        ("random", (0.5, 0.0), 8, 0),
        ("random", (0.999999, 0.999999), 16, 0),
    ],
)
def test_the_crop_is_where_it_is_said_to_be(crop, u, left, top):
    for transposed in (False, True):
        pixels = RAMP.T if transposed else RAMP
        x, y = (top, left) if transposed else (left, top)
        image = decode_image(encode(Image.fromarray(pixels)), 48, crop, u[::-1] if transposed else u)
        np.testing.assert_array_equal(image, np.broadcast_to(pixels[y : y + 48, x : x + 48], (3, 48, 48)))


def test_every_place_of_a_random_crop_is_as_likely():
    lefts = []
    ramp = np.broadcast_to(np.arange(11, dtype=np.uint8), (8, 11))
    for u in (np.arange(400) + 0.5) / 400:
        lefts.append(int(decode_image(encode(Image.fromarray(ramp)), 8, "random", (u, 0.5))[0, 0, 0]))
    assert np.bincount(lefts).tolist() == [100, 100, 100, 100]


def test_without_a_crop_the_whole_picture_is_squeezed():
    pixels = picture(60, 90)
    image = decode_image(encode(Image.fromarray(pixels)), 30, "none")
    expected = Image.fromarray(pixels).resize((30, 30), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(image, np.asarray(expected).transpose(2, 0, 1))


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    assert close(decode_image(encode(Image.fromarray(stripes)), 16), [128] * 3, tolerance=12)


@pytest.mark.parametrize(("height", "width"), [(512, 512), (500, 700), (1023, 770)])
def test_a_jpeg_shrunk_while_it_is_decoded_is_nearly_the_same_picture(height, width):
    data = encode(Image.fromarray(picture(height, width, detail=40)), "JPEG", quality=95)
    for resolution in (32, 100, 256):
        image = decode_image(data, resolution).astype(float)
        side = min(height, width)
        box = ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2)
        whole = Image.open(io.BytesIO(data)).crop(box).resize((resolution,) * 2, Image.Resampling.BICUBIC)
        error = np.mean((image - np.asarray(whole).transpose(2, 0, 1)) ** 2)
        assert image.shape == (3, resolution, resolution)
        assert error < 1.2e-4 * 255**2  # 39 dB; with fewer pixels left than are needed it is 28


def test_trap_8_16_bit_grey_is_scaled_not_clipped():
    values = np.array([0, 257, 25700, 65535], dtype=">u2")
    image = decode_image(png(4, 4, 16, 0, [values.tobytes()] * 4), 4)
    np.testing.assert_array_equal(image, np.broadcast_to(np.array([0, 1, 100, 255]), (3, 4, 4)))


def test_trap_8_16_bit_colour_is_scaled_not_clipped():
    row = np.array([[25700, 65535, 0]] * 4, dtype=">u2").tobytes()
    assert close(decode_image(png(4, 4, 16, 2, [row] * 4), 4), [100, 255, 0])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "RGBa"])
def test_trap_8_transparency_is_white(mode):
    rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 0))  # red that nobody is to see
    if mode == "P":
        hidden = Image.new("P", (8, 8), 0)
        hidden.putpalette([255, 0, 0] + [0] * 765)
        data = encode(hidden, transparency=0)
    else:
        data = encode(rgba.convert(mode).convert("LA" if mode == "LA" else "RGBA"))
    assert close(decode_image(data, 8), [255] * 3)


def test_trap_8_a_transparent_colour_of_rgb_and_grey_is_white():
    grey = png(4, 4, 8, 0, [bytes([9, 9, 9, 50])] * 4, extra=chunk(b"tRNS", struct.pack(">H", 9)))
    assert decode_image(grey, 4)[:, 0].tolist() == [[255, 255, 255, 50]] * 3
    deep = np.array([900, 900, 900, 25700], dtype=">u2").tobytes()
    grey_16 = png(4, 4, 16, 0, [deep] * 4, extra=chunk(b"tRNS", struct.pack(">H", 900)))
    assert decode_image(grey_16, 4)[:, 0].tolist() == [[255, 255, 255, 100]] * 3
    rgb = png(2, 2, 8, 2, [bytes([1, 2, 3, 4, 5, 6])] * 2, extra=chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3)))
    assert decode_image(rgb, 2)[:, 0].tolist() == [[255, 4], [255, 5], [255, 6]]


def test_trap_8_half_transparent_is_half_white():
    data = encode(Image.new("RGBA", (8, 8), (255, 0, 0, 128)))
    assert close(decode_image(data, 8), [255, 127, 127])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_trap_8_exif_rotation_is_applied(orientation):
    upright = np.zeros((32, 48, 3), dtype=np.uint8)
    upright[:16, :24] = 250, 30, 30
    upright[16:, 24:] = 30, 30, 250
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("JPEG", "PNG", "WEBP"):
        data = encode(Image.fromarray(np.ascontiguousarray(turned)), format, exif=exif, quality=100)
        image = decode_image(data, 32)
        np.testing.assert_allclose(image[:, 4, 4], [250, 30, 30], atol=8)
        np.testing.assert_allclose(image[:, 28, 28], [30, 30, 250], atol=8)
        np.testing.assert_allclose(image[:, 4, 28], 0, atol=8)


def test_damaged_exif_costs_the_rotation_only():
    data = encode(Image.new("RGB", (8, 8), (10, 200, 30)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert close(decode_image(data, 8), [10, 200, 30], tolerance=3)


@pytest.mark.parametrize(
    "data", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"GIF89a" + bytes(50), b"", b"text"]
)
def test_trap_8_other_formats_are_not_opened(data):
    with pytest.raises(DecodeError, match="not_an_image"):
        decode_image(data, 8)


def test_trap_8_eps_tiff_bmp_and_gif_are_not_opened():
    for format in ("EPS", "TIFF", "BMP", "GIF"):
        with pytest.raises(DecodeError, match="not_an_image"):
            decode_image(encode(Image.new("RGB", (8, 8)), format), 8)


def test_trap_8_the_number_of_pixels_is_read_before_they_are():
    # headers of huge pictures without pixels: decoding them would be another reason
    for side in (9_000, 12_000, 60_000):
        huge = png(side, side, 8, 2, [])
        with pytest.raises(DecodeError, match="too_many_pixels"):
            decode_image(huge, 8)
    with pytest.raises(DecodeError, match="too_many_pixels"):
        decode_image(encode(Image.new("RGB", (11, 10))), 8, max_pixels=109)
    decode_image(encode(Image.new("RGB", (11, 10))), 8, max_pixels=110)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGB"])
def test_all_modes_become_rgb(mode):
    white = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    assert close(decode_image(encode(white, "JPEG" if mode == "CMYK" else "PNG"), 8), [255] * 3)
    colour = Image.new("RGB", (8, 8), (255, 0, 0)).convert("CMYK")
    assert close(decode_image(encode(colour, "JPEG"), 8), [255, 0, 0], tolerance=3)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_cut_picture_is_an_error_wherever_it_is_cut(format):
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)), format)
    for end in (len(data) // 3, len(data) // 2, len(data) * 2 // 3):
        with pytest.raises(DecodeError, match=r"broken_image|not_an_image"):
            decode_image(data[:end], 16)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
@pytest.mark.parametrize("crop", ["center", "random", "none"])
def test_the_thinnest_pictures_are_pictures(size, crop):
    found = decode_image(encode(Image.new("RGB", size, (10, 20, 30))), 16, crop, (0.7, 0.7))
    assert found.shape == (3, 16, 16) and close(found, [10, 20, 30])


def test_grey_with_transparency_is_laid_on_white():
    pixels = np.zeros((8, 8, 2), dtype=np.uint8)
    pixels[:4] = (100, 255)
    pixels[4:] = (0, 0)
    found = decode_image(encode(Image.fromarray(pixels, "LA")), 8)
    assert close(found[:, :4], [100] * 3) and close(found[:, 4:], [255] * 3)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_of_an_animation_the_first_picture_is_taken(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    buffer = io.BytesIO()
    options = {"lossless": True} if format == "WEBP" else {}
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:], duration=100, **options)
    assert getattr(Image.open(io.BytesIO(buffer.getvalue())), "n_frames", 1) == 3
    assert close(decode_image(buffer.getvalue(), 8), [200, 0, 0])


def test_a_wrong_checksum_in_a_png_is_an_error():
    data = bytearray(encode(Image.fromarray(picture(16, 16)), "PNG"))
    place = data.index(b"IDAT")
    length = int.from_bytes(data[place - 4 : place], "big")
    data[place + 4 + length] ^= 1
    with pytest.raises(DecodeError, match="broken_image"):
        decode_image(bytes(data), 8)


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"<!DOCTYPE html><html><body>404</body></html>",
        b"GIF89a" + bytes(60),
        b"",
        b"\xff\xd8\xff",
    ],
)
def test_what_only_has_the_name_of_a_picture_is_none(data):
    with pytest.raises(DecodeError, match=r"not_an_image|broken_image"):
        decode_image(data, 8)


def test_flipped_bytes_are_an_error_or_a_picture():
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP"):
        data = bytearray(encode(Image.fromarray(picture(32, 32)), format))
        for _ in range(60):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), 5):
                damaged[place] = rng.integers(256)
            with contextlib.suppress(DecodeError):
                assert decode_image(bytes(damaged), 16).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b" a  red\n\tcircle \n", "a red circle"),
        ("une forêt ü".encode(), "une forêt ü"),
        (b"a\0b\0", "ab"),
        (b"\xef\xbb\xbfa cat", "a cat"),
        (b"caf\xe9", "caf\N{REPLACEMENT CHARACTER}"),
        (b"", ""),
        (b" \n\t\r ", ""),
        ("קטן ואדום مثلث".encode(), "קטן ואדום مثلث"),
        (b"a cat " * 17_000, ("a cat " * 17_000).strip()),
        (b"\xff\xfe\xfd", "\N{REPLACEMENT CHARACTER}" * 3),
    ],
)
def test_captions_are_clean_text(data, text):
    assert decode_caption(data) == text


@pytest.mark.parametrize(
    ("spelt", "text"),
    [
        (r"a dog \ud83d", "a dog \N{REPLACEMENT CHARACTER}"),
        (r"\udc4da dog", "\N{REPLACEMENT CHARACTER}a dog"),
        (r"\ud83da dog", "\N{REPLACEMENT CHARACTER}a dog"),
        (r"a dog \ud83d\udc36", "a dog \N{DOG FACE}"),
    ],
)
def test_half_a_surrogate_pair_in_the_json_is_replaced(spelt, text):
    """No tokenizer takes one, and no file in UTF-8."""
    assert decode_caption(f'{{"TEXT": "{spelt}"}}'.encode(), "TEXT") == text


def test_a_caption_may_stand_in_the_json():
    assert decode_caption(b'{"TEXT": " a  cat "}', "TEXT") == "a cat"
    for data in (b"{}", b'{"TEXT": null}', b'{"TEXT": 3}', b"[]", b"{", b"\xff", b"3"):
        with pytest.raises(DecodeError, match="no_caption"):
            decode_caption(data, "TEXT")
