"""The photographs that Noise2Noise is measured on."""

import io
import math
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from carrara.corruption.base import Corruption
from carrara.data.validation import ValidationSet
from experiments import noise2noise_photographs
from experiments.noise2noise_photographs import SIDE, photographs_psnr, write_tiles
from tests import tiny


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


def test_what_a_killed_process_left_is_no_part_and_what_is_there_is_kept(tmp_path, capsys):
    photograph(tmp_path / "in/train/a.jpeg", SIDE, SIDE)
    photograph(tmp_path / "in/val/b.JPG", SIDE, SIDE)
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/train-000007.tar").touch()
    write_tiles(tmp_path / "in", tmp_path / "out")
    assert capsys.readouterr().out == ""
    names = ["train-000000.tar", "val-000000.tar"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    photograph(tmp_path / "in/val/c.png", SIDE, SIDE)
    write_tiles(tmp_path / "in", tmp_path / "out")
    assert "are taken" in capsys.readouterr().out
    assert sorted(written(tmp_path / "out/val-000000.tar")) == ["b-0.png"]


class Tiles:
    """Stands for a `ValidationSet` of two photographs of three tiles each, of grey that noise does not cut off."""

    images = torch.full((6, 3, 8, 8), 128, dtype=torch.uint8)
    keys = (
        "val-000000.tar/a-b-0",
        "val-000000.tar/a-b-1",
        "val-000001.tar/a-b-2",
        *(f"val-000001.tar/c-{k}" for k in range(3)),
    )

    def __len__(self) -> int:
        return 6

    def take(self, indices: np.ndarray) -> dict[str, Any]:
        return {"images": self.images[indices], "keys": [self.keys[k] for k in indices]}


class Louder(Corruption):
    """Each tile is off by two levels more than the one before."""

    def __call__(self, images: torch.Tensor, keys: Sequence[str], version: int) -> torch.Tensor:
        first = 2 * (1 + Tiles.keys.index(keys[0]))
        return images + torch.arange(first, first + 2 * len(images), 2)[:, None, None, None] / 127.5


@pytest.mark.parametrize("size", [2, 6])
def test_a_photograph_has_the_error_of_all_its_tiles(size, monkeypatch):
    monkeypatch.setattr(noise2noise_photographs, "BATCH", size)
    model = tiny.restoration_model(corruption=Louder(0)).eval()
    noisy, made = photographs_psnr(model, cast(ValidationSet, Tiles()))
    errors = (4 + 16 + 36) / 3, (64 + 100 + 144) / 3
    assert noisy == made == pytest.approx(sum(10 * math.log10(255**2 / error) for error in errors) / 2)
    tiny.awake(model)
    assert photographs_psnr(model, cast(ValidationSet, Tiles()))[1] != pytest.approx(noisy, abs=0.01)


def test_without_held_out_photographs_nothing_is_written(tmp_path):
    photograph(tmp_path / "in/train/a.png", SIDE, SIDE)
    with pytest.raises(SystemExit, match=r"no photographs .* for val"):
        write_tiles(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
