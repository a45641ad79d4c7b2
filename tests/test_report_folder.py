"""Grids are cut where their captions say, and what does not fit is not guessed."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from carrara.report_folder import (
    LARGE_TILE,
    MAX_EPOCHS,
    MAX_PICTURES,
    PIXEL_ART,
    read_previews,
    read_strip,
)


def color(index: int) -> tuple[int, int, int]:
    return (index * 7 % 256, index * 31 % 256, index)


def write_grid(folder: Path, stem: str, count: int, columns: int, tile: int, /, **described: object) -> None:
    """A grid of one-coloured tiles and its JSON."""
    grid = Image.new("RGB", (columns * tile, -(-count // columns) * tile))
    for index in range(count):
        row, column = divmod(index, columns)
        grid.paste(color(index), (column * tile, row * tile, (column + 1) * tile, (row + 1) * tile))
    grid.save(folder / f"{stem}.png")
    (folder / f"{stem}.json").write_text(json.dumps({"columns": columns, "tile": tile, **described}))


def decode(uri: str) -> Image.Image:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return image.convert("RGB")


def test_tiles_are_cut_where_their_captions_say(tmp_path: Path) -> None:
    captions = [{"caption": str(k), "correct": (True, False, None)[k % 3]} for k in range(10)]
    write_grid(tmp_path, "epoch=0003", 12, 4, 8, captions=captions)
    (preview,) = read_previews(tmp_path, "epoch")
    assert (preview.epoch, preview.right, preview.judged, preview.left_out) == (3, 4, 7, 0)
    for index, picture in enumerate(preview.pictures):
        assert picture.caption == str(index) and picture.correct is captions[index]["correct"]
        image = decode(picture.uri)
        assert image.size == (8, 8) and image.getcolors() == [(64, color(index))]


def test_pairs_stay_together(tmp_path: Path) -> None:
    write_grid(tmp_path, "reconstruction=0001", 8, 4, 8, captions=["a", "b", "c", "d"])
    (preview,) = read_previews(tmp_path, "reconstruction", width=2)
    images = [decode(picture.uri) for picture in preview.pictures]
    assert [(i.getpixel((0, 0)), i.getpixel((15, 7))) for i in images] == [
        (color(k), color(k + 1)) for k in (0, 2, 4, 6)
    ]


@pytest.mark.parametrize("wrong", [{"columns": 3}, {"tile": 9}, {"tile": 0}, {"captions": ["a"] * 13}])
def test_grid_that_does_not_fit_is_shown_whole(tmp_path: Path, wrong: dict[str, object]) -> None:
    write_grid(tmp_path, "epoch=0000", 12, 4, 8, **{"captions": ["a", "b"], **wrong})
    (preview,) = read_previews(tmp_path, "epoch")
    assert len(preview.pictures) == 1 and decode(preview.pictures[0].uri).size == (32, 24)


def test_page_stays_small_for_many_pictures(tmp_path: Path) -> None:
    for epoch in range(40):
        write_grid(tmp_path, f"epoch={epoch:04d}", 64, 8, 4, captions=["a"] * 64)
    previews = read_previews(tmp_path, "epoch")
    assert len(previews) == MAX_EPOCHS and previews[0].epoch == 0 and previews[-1].epoch == 39
    assert all(len(p.pictures) == MAX_PICTURES and p.left_out == 16 for p in previews)


def test_large_pictures_are_reduced(tmp_path: Path) -> None:
    write_grid(tmp_path, "epoch=0000", 2, 2, 2 * LARGE_TILE, captions=["a", "b"])
    write_grid(tmp_path, "epoch=0001", 2, 2, PIXEL_ART, captions=["a", "b"])
    large, small = read_previews(tmp_path, "epoch")
    assert not large.pixel_art and decode(large.pictures[1].uri).size == (LARGE_TILE, LARGE_TILE)
    assert small.pixel_art and decode(small.pictures[1].uri).size == (PIXEL_ART, PIXEL_ART)


def test_epochs_come_in_numerical_order(tmp_path: Path) -> None:
    for epoch in (9999, 10000, 2):
        write_grid(tmp_path, f"epoch={epoch:04d}", 1, 1, 4, captions=["a"])
    write_grid(tmp_path, "epoch=last", 1, 1, 4, captions=["a"])
    assert [preview.epoch for preview in read_previews(tmp_path, "epoch")] == [2, 9999, 10000]


def test_strip_is_cut_by_captions_and_times(tmp_path: Path) -> None:
    write_grid(tmp_path, "strip", 6, 3, 8, captions=["a", "b"], t=[1, 0.5, 0])
    strip = read_strip(tmp_path)
    assert strip is not None and strip.t == [1, 0.5, 0] and [caption for caption, _ in strip.rows] == ["a", "b"]
    assert [decode(uri).getpixel((4, 4)) for _, uris in strip.rows for uri in uris] == [color(k) for k in range(6)]


def test_strip_that_does_not_fit_is_left_out(tmp_path: Path) -> None:
    write_grid(tmp_path, "strip", 6, 3, 8, captions=["a", "b"], t=[1, 0])
    assert read_strip(tmp_path) is None
