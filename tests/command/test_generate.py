"""What `generate.py` makes of its settings before it builds anything."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from carrara.command.generate import _source, main
from carrara.errors import UserError
from carrara.run_folder import made_folder


@pytest.fixture
def order(tmp_path: Path) -> dict[str, Any]:
    Image.new("RGB", (20, 30), (255, 0, 0)).save(tmp_path / "image.png")
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 4, 8))
    mask.save(tmp_path / "mask.png")
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no picture")
    return {"image": str(tmp_path / "image.png"), "mask": None, "strength": None, "folder": tmp_path}


def test_without_a_picture_there_is_no_source(order):
    assert _source(order | {"image": None}, 8) is None


def test_a_picture_alone_is_changed_and_a_mask_painted(order):
    source = _source(order, 8)
    assert source is not None and source.strength == 0.75 and source.mask is None
    assert source.image.shape == (3, 8, 8)
    assert torch.equal(source.image[:, 0, 0], torch.tensor([1.0, -1, -1]))
    masked = _source(order | {"mask": str(order["folder"] / "mask.png")}, 8)
    assert masked is not None and masked.strength == 1 and masked.mask is not None
    assert masked.mask[:, :4].all() and not masked.mask[:, 4:].any()
    weak = _source(order | {"mask": str(order["folder"] / "mask.png"), "strength": 0.3}, 8)
    assert weak is not None and weak.strength == 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None, "strength": 0.5}, "image=FILE"),
        ({"image": None, "mask": "mask.png"}, "image=FILE"),
        ({"strength": 0}, "strength must be"),
        ({"strength": 1.5}, "strength must be"),
        ({"strength": "much"}, "strength must be"),
        ({"image": ["image.png", "mask.png"]}, "this run starts from one picture: image=FILE"),
        ({"image": "missing.png"}, "image=.*missing.png cannot be read: No such file"),
        ({"image": "text.png"}, "image=.*text.png is no picture"),
        ({"mask": "black.png"}, "black everywhere"),
    ],
)
def test_mistakes_are_named(order, changes, message):
    folder = order["folder"]
    paths = {k: str(folder / v) if k in ("image", "mask") and isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(UserError, match=message) as mistake:
        _source(order | paths, 8)
    assert "\n" not in str(mistake.value)


def test_a_missing_prompt_is_told():
    with pytest.raises(UserError, match=r"prompt is missing: .*export=FOLDER"):
        main(Path(__file__).parents[2] / "conf", ["run=somewhere"])


def test_a_file_in_the_way_of_the_pictures_is_told_before_they_are_made(tmp_path):
    (tmp_path / "picture.png").write_text("")
    with pytest.raises(UserError, match=r"out=.*picture\.png cannot be made a folder: File exists"):
        made_folder(tmp_path / "picture.png")
