import json

import numpy as np
import pytest
import torch
from PIL import Image

from carrara.pipeline.pictures import grid, save_grid, save_strip, to_uint8


def test_levels_of_a_file():
    assert to_uint8(torch.tensor([-1.0, 1.0, 0.0, -3.0, 3.0])).tolist() == [0, 255, 128, 0, 255]
    every = torch.arange(256)
    assert torch.equal(to_uint8(every / 127.5 - 1), every.to(torch.uint8))  # there and back
    assert torch.equal(to_uint8((every / 127.5 - 1).double()), every.to(torch.uint8))


def tiles(n: int) -> torch.Tensor:
    """n tiles of 2 × 3 pixels of one level each."""
    return torch.arange(1, n + 1, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 2, 3)


def test_a_grid_goes_row_by_row():
    pixels = np.asarray(grid(tiles(5), columns=3))
    assert pixels.shape == (4, 9, 3)
    assert pixels[::2, ::3, 0].tolist() == [[1, 2, 3], [4, 5, 0]]


def test_a_grid_knows_its_captions(tmp_path):
    captions: list = [{"caption": f"ünïcode {k}", "correct": k == 0} for k in range(2)]
    save_grid(tmp_path / "new" / "grid.png", tiles(2), 8, captions)
    assert Image.open(tmp_path / "new" / "grid.png").size == (6, 2)
    facts = json.loads((tmp_path / "new" / "grid.json").read_text(encoding="utf-8"))
    assert facts == {"captions": captions, "columns": 2, "tile": 3}


def test_a_strip_has_a_row_a_caption_and_a_column_a_step(tmp_path):
    frames = torch.stack([tiles(2), tiles(2) + 10, tiles(2) + 20])  # three steps of two pictures
    save_strip(tmp_path / "strip.png", frames, ["a", "b"], [0.9, 0.5, 0.0])
    pixels = np.asarray(Image.open(tmp_path / "strip.png"))
    assert pixels[::2, ::3, 0].tolist() == [[1, 11, 21], [2, 12, 22]]
    assert json.loads((tmp_path / "strip.json").read_text()) == {"captions": ["a", "b"], "t": [0.9, 0.5, 0.0]}


@pytest.mark.parametrize("n", [1, 8, 9])
def test_every_tile_is_somewhere(n):
    found = set(np.unique(np.asarray(grid(tiles(n), 8))).tolist()) - {0}
    assert found == set(range(1, n + 1))
