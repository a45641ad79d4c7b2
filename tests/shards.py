"""Small shards for the tests of data."""

import io
import json
import signal
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webdataset import TarWriter

from carrara.data.loader import Loader, Share
from carrara.data.manifest import Manifest
from carrara.data.order import Stream
from carrara.data.reader import Decoding, Samples, ShardReader

Members = dict[str, bytes]


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Else the test fails, whatever exceptions the code catches."""

    def late(*_: object) -> None:
        pytest.fail(f"not done within {seconds} s")

    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def png(value: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A picture of one colour that tells `value` (< 65536)."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (value % 256, value // 256, 77)).save(buffer, "PNG")
    return buffer.getvalue()


def value_of(image: np.ndarray) -> int:
    """The value of `png`, from a decoded (3, R, R) picture."""
    red, green = (np.unique(channel) for channel in image[:2])
    assert len(red) == len(green) == 1
    return int(red[0]) + 256 * int(green[0])


def sample(value: int, facts: dict[str, Any] | None = None) -> Members:
    """Members of one sample by suffix."""
    return {
        "png": png(value),
        "txt": f"caption {value}".encode(),
        "json": json.dumps(facts or {}).encode(),
    }


@pytest.fixture(name="sample")
def sample_fixture() -> Callable[..., Members]:
    return sample


@pytest.fixture(name="value_of")
def value_of_fixture() -> Callable[[np.ndarray], int]:
    return value_of


@pytest.fixture
def write_shard(tmp_path: Path) -> Callable[..., Path]:
    """Writes `name` as webdataset does: samples by key, or those that `sample` makes of some values."""

    def write(name: str, samples: dict[str, Members] | Iterable[int]) -> Path:
        by_key = samples if isinstance(samples, dict) else {f"{v:06d}": sample(v) for v in samples}
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for key, members in by_key.items():
                tar.write({"__key__": key, **members})
        return path

    return write


@pytest.fixture
def write_tar(tmp_path: Path) -> Callable[..., Path]:
    """Writes `name` with the standard library: members in any order, of any name."""

    def write(name: str, members: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
        path = tmp_path / name
        with tarfile.open(path, "w", format=format) as tar:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture
def manifest(write_shard: Callable[..., Path], tmp_path: Path) -> Manifest:
    """Samples 0 ... 47 in four uneven shards."""
    starts = [0, 13, 17, 39, 48]
    paths = [write_shard(f"{s}.tar", range(starts[s], starts[s + 1])) for s in range(4)]
    return Manifest.load([str(path) for path in paths], tmp_path / "cache")


def make_loader(
    manifest: Manifest,
    batch: int = 12,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    *,
    seed: int = 0,
    keep: bool = False,
    groups: int = 1,
    decoding: Decoding | None = None,
    **options: Any,
) -> Loader:
    """A loader of all samples, whose epoch is the whole set."""
    samples = Samples(ShardReader(manifest, 2), decoding or Decoding(8, ".txt"), keep)
    mask = np.ones(len(manifest), dtype=bool)
    stream = Stream(mask, manifest.starts, seed, 2, groups, batch)
    options = {"steps_per_epoch": len(manifest) // batch, **options}
    return Loader(samples, stream, Share(batch, rank, world, accumulate), **options)


@pytest.fixture
def loader() -> Callable[..., Loader]:
    return make_loader
