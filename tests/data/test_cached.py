"""A sample's cache: back as it was, and from strangers only what it says to be."""

import io
import json
import zipfile

import numpy as np
import pytest

from carrara.data.cached import Cached, Facts, facts_of, pack, unpack
from carrara.data.decode import DecodeError
from carrara.data.shard_index import scan

FACTS: Facts = {"autoencoder": "5" * 64, "dtype": "float32", "latent_shape": "4x2x3", "text_width": 5}
TEXT = json.dumps(FACTS, sort_keys=True)


def cached(shape=(4, 2, 3), width=5, length=7) -> Cached:
    rng = np.random.default_rng(0)
    shapes = (shape, shape, (length, width), (width,))
    return Cached(*(rng.normal(size=one).astype(np.float32) for one in shapes))


def npy(value) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value)
    return buffer.getvalue()


def header(text: bytes) -> bytes:
    padded = text.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded


def zipped(facts: bytes, method: int = zipfile.ZIP_STORED, **rest: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, member in {"facts": facts, **rest}.items():
            archive.writestr(f"{name}.npy", member)
    return buffer.getvalue()


def damaged(data: bytes) -> bytes:
    place = data.find(b"facts.npy") + 17
    return data[:place] + bytes(255 - one for one in data[place : place + 6]) + data[place + 6 :]


HUGE = header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,), }")
HOSTILE = {
    "no archive": npy(np.zeros(3)),
    "a shape without its numbers": zipped(HUGE),
    "a header that is no Python": zipped(header(b"(((")),
    "compressed": zipped(npy(np.array(TEXT)), zipfile.ZIP_DEFLATED),  # what a bomb has to be
    "damaged LZMA": damaged(zipped(npy(np.array(TEXT)), zipfile.ZIP_LZMA)),
    "a list of facts": zipped(npy(np.array("[1, 2]"))),
    "nested facts": zipped(npy(np.array("[" * 100_000))),
    "endless facts": zipped(npy(np.array(json.dumps({"autoencoder": "5" * 5000})))),
    "an object": zipped(header(b"{'descr': '|O', 'fortran_order': False, 'shape': (), }") + b"cos\nsystem\n."),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_strangers_cache_is_broken_and_not_the_end(write_shard, sample, name):
    member = HOSTILE[name]
    assert facts_of(member) == ""
    with pytest.raises(DecodeError, match="broken_cache"):
        unpack(member, TEXT, text=True)
    index = scan(str(write_shard("a.tar", {"0": {**sample(0), "cache.npz": member}, "1": sample(1)})))
    assert len(index.keys) == 2 and index.cached == ""


@pytest.mark.parametrize("text", [True, False])
def test_what_was_packed_comes_back(text):
    one = cached()
    member = pack(one, FACTS)
    assert facts_of(member) == TEXT
    back = unpack(member, TEXT, text)
    np.testing.assert_array_equal(back.mean, one.mean)
    np.testing.assert_array_equal(back.std, one.std)
    if text:
        np.testing.assert_array_equal(back.tokens, one.tokens)
        np.testing.assert_array_equal(back.pooled, one.pooled)
    else:
        assert back.tokens is None and back.pooled is None


@pytest.mark.parametrize(
    "changes",
    [
        {"mean": np.zeros((4, 3, 2))}, {"std": np.zeros((4, 2, 1))}, {"mean": np.zeros(24)}, {"tokens": np.zeros(5)},
        {"tokens": np.zeros((7, 4))}, {"pooled": np.zeros(4)}, {"mean": np.full((4, 2, 3), "x")},
    ],
)  # fmt: skip
def test_shapes_are_those_that_the_facts_tell(changes):
    """Else one sample of a stranger's would not go into a batch with the others."""
    arrays = {**cached()._asdict(), **changes}
    member = zipped(npy(np.array(TEXT)), zipfile.ZIP_STORED, **{name: npy(value) for name, value in arrays.items()})
    assert facts_of(member) == TEXT
    with pytest.raises(DecodeError, match="broken_cache"):
        unpack(member, TEXT, text=True)
