"""The photographs that Noise2Noise is measured on."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.noise2noise_photographs import SIDE, write_tiles


def photograph(path: Path, height: int, width: int) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def written(shard: Path) -> dict[str, np.ndarray]:
    with tarfile.open(shard) as tar:
        return {
            member.name: np.asarray(Image.open(io.BytesIO(tar.extractfile(member).read())))  # type: ignore[union-attr]
            for member in tar.getmembers()
        }


def test_photographs_are_cut_into_tiles_around_their_centre_and_val_is_held_out(tmp_path):
    pixels = photograph(tmp_path / "in/train/a.png", 2 * SIDE + 10, SIDE + 5)
    photograph(tmp_path / "in/test/b.png", SIDE, SIDE)
    photograph(tmp_path / "in/val/c.png", SIDE, 2 * SIDE)
    write_tiles(tmp_path / "in", tmp_path / "out")
    train, val = (written(tmp_path / f"out/{name}-000000.tar") for name in ("train", "val"))
    assert sorted(train) == ["a-0.png", "a-1.png", "b-0.png"]
    assert sorted(val) == ["c-0.png", "c-1.png"]
    assert np.array_equal(np.concatenate([train["a-0.png"], train["a-1.png"]]), pixels[5 : 5 + 2 * SIDE, 2 : 2 + SIDE])


def test_without_held_out_photographs_nothing_is_written(tmp_path):
    photograph(tmp_path / "in/train/a.png", SIDE, SIDE)
    with pytest.raises(SystemExit, match=r"no photographs .* for val"):
        write_tiles(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
