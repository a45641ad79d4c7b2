"""Tensors to picture files: single pictures, grids with their captions, strips of intermediate steps."""

import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [−1, 1] to the 256 levels of a file, uint8."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def grid(images: Tensor, columns: int) -> Image.Image:
    """uint8 images (N, 3, R, R), row by row in `columns` columns; the last row is filled with black."""
    n, _, height, width = images.shape
    rows = -(-n // columns)
    canvas = torch.zeros(3, rows * height, columns * width, dtype=torch.uint8)
    for k, image in enumerate(images.cpu()):
        row, column = divmod(k, columns)
        canvas[:, row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    return Image.fromarray(canvas.permute(1, 2, 0).numpy())


def save_grid(path: Path, images: Tensor, columns: int, captions: list[dict[str, str | bool | None]]) -> None:
    """A grid as PNG, and beside it a JSON that says what its tiles show.

    Args:
        images: uint8 (N, 3, R, R).
        captions: {"caption", "correct"} of each picture, or of each pair or triple of neighbours.
    """
    columns = min(columns, len(images))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(images, columns).save(path)
    facts = {"captions": captions, "columns": columns, "tile": images.shape[-1]}
    path.with_suffix(".json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


def save_strip(path: Path, frames: Tensor, captions: list[str], times: list[float]) -> None:
    """From noise to picture: a row a caption, a column a step, and a JSON that says which.

    Args:
        frames: uint8 (steps, N, 3, R, R).
        captions: N texts.
        times: t of each step.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(frames.transpose(0, 1).flatten(0, 1), columns=len(frames)).save(path)
    facts = {"captions": captions, "t": times}
    path.with_suffix(".json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
