"""Reads what a run left in its folder. What is missing, damaged or cut is left out, never an error."""

import base64
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite, nan
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

MAX_EPOCHS = 16  # the page stays a few MB however long the run and however large its pictures
MAX_PICTURES = 48
PIXEL_ART = 96  # tiles up to this many pixels are kept exactly and enlarged without smoothing
LARGE_TILE = 256

_DAMAGED = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Metrics:
    """`metrics.jsonl`: one row a line, numbers only (null counts as not a number)."""

    rows: list[dict[str, float]] = field(default_factory=list)
    damaged: int = 0  # lines that are no JSON object, such as one cut by a kill

    def names(self) -> list[str]:
        """Every name that was logged, in the order of its first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def last(self, name: str) -> float | None:
        """The last value logged under `name`, which may be NaN; None if there is none."""
        return next((row[name] for row in reversed(self.rows) if name in row), None)

    def points(self, name: str, against: str) -> list[tuple[float, float]]:
        """The pairs (row[against], row[name]); the first is finite, the second perhaps not."""
        return [(row[against], row[name]) for row in self.rows if name in row and isfinite(row.get(against, nan))]


@dataclass(frozen=True)
class Picture:
    """One picture ready for the page. `correct` is None where nobody can tell."""

    uri: str
    caption: str
    correct: bool | None = None


@dataclass(frozen=True)
class Preview:
    """The pictures of one epoch; `left_out` were too many for the page."""

    epoch: int
    pictures: list[Picture]
    left_out: int = 0
    pixel_art: bool = True

    @property
    def judged(self) -> int:
        return sum(picture.correct is not None for picture in self.pictures)

    @property
    def right(self) -> int:
        return sum(picture.correct is True for picture in self.pictures)


@dataclass(frozen=True)
class Strip:
    """From noise to picture: for each caption the data URIs of its pictures at the times `t`."""

    rows: list[tuple[str, list[str]]]
    t: list[float]
    pixel_art: bool = True


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a YAML file and its content; what cannot be read is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return "", {}
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return text, {}
    return text, content if isinstance(content, dict) else {}


def number(value: object) -> float | None:
    """A JSON value as a number: null is NaN; text, booleans and lists are None."""
    if value is None:
        return nan
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def read_metrics(path: Path) -> Metrics:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return Metrics()
    rows: list[dict[str, float]] = []
    damaged = 0
    for line in filter(str.strip, lines):
        try:
            content = json.loads(line)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            damaged += 1
            continue
        rows.append({str(k): v for k, v in ((k, number(v)) for k, v in content.items()) if v is not None})
    return Metrics(rows, damaged)


def _caption(entry: object) -> tuple[str, bool | None]:
    if isinstance(entry, dict):
        correct = entry.get("correct")
        return str(entry.get("caption", "")), correct if isinstance(correct, bool) else None
    return str(entry), None


def _captions(content: dict[str, Any]) -> list[tuple[str, bool | None]]:
    entries = content.get("captions")
    return [_caption(entry) for entry in entries] if isinstance(entries, list) else []


def _whole(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _open(path: Path) -> Image.Image:
    with Image.open(path, formats=["PNG"]) as image:
        return image.convert("RGB")


def _uri(image: Image.Image, pixel_art: bool, height: int) -> str:
    """A data URI: exact PNG for pixel art, else a JPEG of at most LARGE_TILE pixels for each `height`."""
    buffer = io.BytesIO()
    if pixel_art:
        image.save(buffer, "PNG", optimize=True)
    else:
        scale = min(1.0, LARGE_TILE / height)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=86)
    kind = "png" if pixel_art else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _tiles(image: Image.Image, tile: int, columns: int, width: int, count: int) -> Iterator[Image.Image]:
    """The first `count` groups of `width` neighbouring tiles, row by row."""
    for index in range(count):
        row, column = divmod(index * width, columns)
        left, top = column * tile, row * tile
        yield image.crop((left, top, left + width * tile, top + tile))


def _read_preview(path: Path, epoch: int, width: int) -> Preview | None:
    """A grid cut into its pictures. A grid that is not what its JSON says is shown in one piece."""
    content = read_json(path.with_suffix(".json"))
    captions, columns, tile = _captions(content), _whole(content.get("columns")), _whole(content.get("tile"))
    try:
        image = _open(path)
    except _DAMAGED:
        return None
    fits = columns and tile and columns % width == 0 and image.width == columns * tile
    if not fits or len(captions) * width > columns * (image.height // tile):
        pixel_art = max(image.size) <= 10 * PIXEL_ART
        text = "; ".join(caption for caption, _ in captions)
        return Preview(epoch, [Picture(_uri(image, pixel_art, image.height // 4), text)], 0, pixel_art)
    pixel_art = tile <= PIXEL_ART
    cut = _tiles(image, tile, columns, width, min(len(captions), MAX_PICTURES))
    pictures = [Picture(_uri(one, pixel_art, tile), *caption) for one, caption in zip(cut, captions, strict=False)]
    return Preview(epoch, pictures, len(captions) - len(pictures), pixel_art)


def read_previews(samples: Path, kind: str, width: int = 1) -> list[Preview]:
    """The grids `<kind>=<number>.png` in order, thinned to MAX_EPOCHS with the first and the last kept.

    `width` neighbouring tiles make one picture: 1 for samples, 2 for pairs (original, reconstruction), 3 for
    noisy picture, estimate and original.
    """
    named = ((re.fullmatch(rf"{kind}=(\d+)\.png", path.name), path) for path in samples.glob(f"{kind}=*.png"))
    found = sorted((int(match[1]), path) for match, path in named if match)
    if len(found) > MAX_EPOCHS:
        last = len(found) - 1
        found = [found[round(i * last / (MAX_EPOCHS - 1))] for i in range(MAX_EPOCHS)]
    previews = (_read_preview(path, epoch, width) for epoch, path in found)
    return [preview for preview in previews if preview and preview.pictures]


def read_strip(samples: Path) -> Strip | None:
    """`strip.png` cut into its pictures; None if it is missing or is not what `strip.json` says."""
    content = read_json(samples / "strip.json")
    captions = [caption for caption, _ in _captions(content)]
    listed = content.get("t")
    t = [nan if (v := number(value)) is None else v for value in listed] if isinstance(listed, list) else []
    try:
        image = _open(samples / "strip.png")
    except _DAMAGED:
        return None
    tile = image.width // len(t) if t else 0
    if not tile or image.size != (tile * len(t), tile * len(captions)):
        return None
    pixel_art = tile <= PIXEL_ART
    uris = [_uri(one, pixel_art, tile) for one in _tiles(image, tile, len(t), 1, len(t) * len(captions))]
    rows = [(caption, uris[k * len(t) : (k + 1) * len(t)]) for k, caption in enumerate(captions)]
    return Strip(rows, t, pixel_art)
