"""Damaged tars and pictures by chance: each is read or refused, in time, and every sample is accounted for.

`FUZZ=10000 pytest tests/data/test_fuzz.py` tries so many of each.
"""

import io
import os
import tarfile
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from carrara.data.cache import ShardCache
from carrara.data.decode import DecodeError, decode_image
from carrara.data.doctor import examine
from carrara.data.reader import Decoding
from tests.shards import within

COUNT = int(os.environ.get("FUZZ", "200"))
Generator = np.random.Generator


def flip(data: bytearray, rng: Generator) -> None:
    for place in rng.integers(0, len(data), rng.integers(1, 9)):
        data[place] = rng.integers(256)


def cut(data: bytearray, rng: Generator) -> None:
    del data[rng.integers(0, len(data)) :]


def remove(data: bytearray, rng: Generator) -> None:
    start = int(rng.integers(0, len(data)))
    del data[start : start + int(rng.integers(1, 1500))]


def insert(data: bytearray, rng: Generator) -> None:
    start = int(rng.integers(0, len(data)))
    data[start:start] = rng.bytes(int(rng.integers(1, 1500)))


def blank(data: bytearray, rng: Generator) -> None:
    start = int(rng.integers(0, len(data)))
    stop = min(len(data), start + int(rng.integers(1, 3000)))
    data[start:stop] = bytes(stop - start)


def move(data: bytearray, rng: Generator) -> None:
    start, end = (int(place) for place in rng.integers(0, len(data), 2))
    data[end:end] = data[start : start + 512]


def digits(data: bytearray, rng: Generator) -> None:
    """Numbers where headers have them: sizes, offsets and counts that are not so."""
    places = [place for place, value in enumerate(data) if 48 <= value < 58] or [0]
    for place in rng.choice(places, 3):
        data[place] = 48 + int(rng.integers(10))


def record(data: bytearray, rng: Generator) -> None:
    """Another size in a pax record; it leads back, or beyond the end."""
    place = data.find(b" size=", int(rng.integers(0, len(data))))
    if place >= 0:
        data[place + 6 : place + 11] = (b"-1536", b"-9999", b"99999", b"1e+04", b"00512")[rng.integers(5)]


MUTATIONS = (flip, cut, remove, insert, blank, move, digits, record)


def mutated(data: bytes, rng: Generator) -> bytes:
    copy = bytearray(data)
    for _ in range(rng.integers(1, 3)):
        if copy:
            MUTATIONS[rng.integers(len(MUTATIONS))](copy, rng)
    return bytes(copy)


def picture(format: str, mode: str, **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


PICTURES = {
    "jpeg": picture("JPEG", "RGB"),
    "progressive": picture("JPEG", "RGB", progressive=True),
    "cmyk": picture("JPEG", "CMYK"),
    "png": picture("PNG", "RGBA"),
    "palette": picture("PNG", "P"),
    "grey": picture("PNG", "L"),
    "webp": picture("WEBP", "RGBA"),
    "lossless": picture("WEBP", "RGB", lossless=True),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name):
    rng = np.random.default_rng(len(name))
    for number in range(-(-COUNT // len(PICTURES))):
        data = mutated(PICTURES[name], rng)
        with within(10), suppress(DecodeError):
            image = decode_image(data, 16, "random", rng.random(2).tolist())
            assert image.shape == (3, 16, 16) and image.dtype == np.uint8, (name, number)


def with_records(clean: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(clean)) as source, tarfile.open(fileobj=buffer, mode="w") as target:
        for member in source:
            member.pax_headers = {"path": f"é{member.name}", "size": f"{member.size:05d}"}
            target.addfile(member, source.extractfile(member))
    return buffer.getvalue()


@pytest.mark.parametrize("pax", [False, True])
def test_shards(tmp_path, write_shard, sample, pax):
    """As webdataset writes them, and with records of every member's name and size."""
    samples = {f"{k:03d}": sample(k, {"punsafe": 0.1, "WIDTH": 64}) for k in range(5)}
    for key, name in zip(samples, ("jpeg", "webp", "png"), strict=False):
        samples[key] = {**samples[key], "png": PICTURES[name]}
    clean = write_shard("clean.tar", samples).read_bytes()
    if pax:
        clean = with_records(clean)
    rng = np.random.default_rng(7)
    path = tmp_path / "mutated.tar"
    cache, decoding = ShardCache(tmp_path, 1e9), Decoding(8, ".txt")
    read = 0
    for number in range(-(-COUNT // 2)):
        path.write_bytes(mutated(clean, rng))
        os.utime(path, (number, number))
        with within(20):
            (shard,) = examine([str(path)], tmp_path / "cache", cache, decoding, {}, 1).shards
        assert shard.samples == shard.ok + sum(shard.skipped.values()), number
        assert bool(shard.unusable) != bool(shard.samples), number
        read += shard.ok
    assert read > COUNT // 2  # most damage costs a sample or two of five
