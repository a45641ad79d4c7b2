"""Read the scene off a picture of shapes, exactly or not at all.

Analysis by synthesis: find the background and the objects by color, fit every shape and size to each object,
draw the best reading again and refuse it (None) where it does not explain the picture. So a score built on it
counts facts: noise, blends and half-formed objects are unreadable, not guessed.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from carrara.data.shapes import (
    BACKGROUNDS,
    COLORS,
    RADII,
    RELATIONS,
    SHAPES,
    Object,
    Scene,
    coverage,
    parse_caption,
)

Array = NDArray[np.float32]


class _Pictures(Protocol):
    """A NumPy array or a CPU tensor: this module need not import torch."""

    def __array__(self) -> NDArray[Any]: ...


@dataclass(frozen=True)
class _Fit:
    """An object as found: center (x, y) and radius in pixels of the grid."""

    shape: str
    color: str
    center: Array
    radius: float


_GRID = 32  # pictures are read at this size, where noise is averaged and every threshold below was chosen
_WINDOW = 20  # side of the square around an object in which shapes are compared, in pixels of the grid
_PALETTE = np.array([*COLORS.values(), *BACKGROUNDS.values()], np.float32)
_RADII = {size: radius * _GRID for size, radius in RADII.items()}
# Where fitting starts: every shape in every size.
_STARTS = [(shape, radius) for shape in SHAPES for radius in _RADII.values()]
_DRIFT_COST = 0.02  # a pixel of radius weighs as much as 2 % of unexplained contrast
_MAX_RADIUS_ERROR = 0.8  # pixels; what lies between the sizes is neither
# What a reading may leave unexplained, see ShapesParser. Measured at 32 pixels: clean pictures stay below
# 0.001 and 2, those blurred by 0.7 pixels with noise of 8/255 below 0.05 and 1100, JPEG of quality 90 mostly
# below 0.1 and 1900; of the blends of two pictures at most 0.4 % stay below both limits.
_MAX_UNEXPLAINED = 0.12
_MAX_LOCAL_ERROR = 1800.0


class ShapesParser:
    """`parser(images) -> list[Scene | None]`, None where the picture cannot be read as one scene.

    Images are uint8 (N, 3, R, R), RGB, a NumPy array or a CPU tensor, R = `resolution` >= 32; they are read
    at 32 × 32. A reading is refused unless the radius of every object is one of the two within 0.8 pixels
    and, with e the blurred difference in RGB between the picture and the reading drawn again, the sum of e²
    around every object is at most 0.12 of its blurred squared contrast with the background, and the mean of
    e² over any 5 × 5 pixels is at most 1800.
    """

    def __init__(self, resolution: int) -> None:
        if resolution < _GRID:
            raise ValueError(f"the parser reads pictures of {_GRID} pixels or more, not {resolution}")
        self.resolution = resolution
        self._shrink = _area_average(resolution, _GRID)

    def __call__(self, images: _Pictures) -> list[Scene | None]:
        pixels = np.asarray(images)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (3, *(self.resolution,) * 2):
            size = f"(N, 3, {self.resolution}, {self.resolution})"
            raise ValueError(f"expected uint8 images {size}, got {pixels.dtype} {pixels.shape}")
        return [self._read(image) for image in pixels.astype(np.float32)]

    def _read(self, image: Array) -> Scene | None:
        if self.resolution != _GRID:
            image = np.matmul(self._shrink @ image, self._shrink.T, dtype=np.float32)
        nearest = _nearest_color(image)
        counts = np.bincount(nearest.ravel(), minlength=len(_PALETTE))[len(COLORS) :]
        background = len(COLORS) + int(counts.argmax())
        territories = _territories(nearest != background)
        if not 1 <= len(territories) <= 2:
            return None
        fits = [_fit(image, territory, _PALETTE[background]) for territory in territories]
        unexplained, local_error = _unexplained(image, _PALETTE[background], territories, fits)
        if unexplained > _MAX_UNEXPLAINED or local_error > _MAX_LOCAL_ERROR:
            return None
        return _scene(tuple(BACKGROUNDS)[background - len(COLORS)], fits)


def _unexplained(
    image: Array, background: Array, territories: list[NDArray[np.bool_]], fits: list[_Fit]
) -> tuple[float, float]:
    """How far the picture is from `fits` drawn on `background`: the two numbers `ShapesParser` limits."""
    remaining = image - background[:, None, None]
    contrasts = []
    for fit in fits:
        radius = np.array([fit.radius / _GRID], np.float32)
        alpha = coverage(fit.shape, radius, fit.center[None] / np.float32(_GRID), _GRID)
        drawn = alpha * (np.array(COLORS[fit.color], np.float32) - background)[:, None, None]
        remaining = remaining - drawn
        contrasts.append(np.square(_blur(drawn)).sum())
    error = np.square(_blur(remaining)).sum(0)
    shares = [error[mask].sum() / contrast for mask, contrast in zip(territories, contrasts)]
    return float(max(shares)), float(ndimage.uniform_filter(error, 5).max())


def _area_average(size: int, target: int) -> Array:
    """(target, size) matrix: entry i of the result is the source's mean over [i, i + 1) · size / target."""
    edges = np.arange(target + 1) * (size / target)
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.clip(overlap, 0, None) * (target / size)).astype(np.float32)


def _blur(image: Array) -> Array:
    """Binomial 3 × 3 filter over the last two axes: forgives edges that are half a pixel softer than ours."""
    for axis in (-2, -1):
        image = ndimage.correlate1d(image, [0.25, 0.5, 0.25], axis)
    return image


def _nearest_color(image: Array) -> NDArray[np.intp]:
    """Index into the palette of the color nearest to each pixel: (3, H, W) -> (H, W)."""
    # |p - c|² without |p|², which is the same for every c
    distance = np.square(_PALETTE).sum(1)[:, None] - 2 * _PALETTE @ image.reshape(3, -1)
    nearest: NDArray[np.intp] = distance.argmin(0).reshape(image.shape[1:])
    return nearest


def _territories(foreground: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """A mask (H, W) per object: what is near it and nearer than any other. Under 10 pixels is no object."""
    labels, count = ndimage.label(foreground, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    distances = [ndimage.distance_transform_edt(labels != k) for k in range(1, count + 1) if sizes[k] >= 10]
    return [
        (own <= 2.5) & np.all([own < other for other in distances if other is not own], axis=0) for own in distances
    ]


def _fit(image: Array, territory: NDArray[np.bool_], background: Array) -> _Fit:
    """The shape, color, place and radius that explain the picture in a territory best."""
    offset = (image - background[:, None, None]) * territory
    directions = _PALETTE[: len(COLORS)] - background
    # A pixel that a color c covers by alpha lies at background + alpha (c - background).
    lengths = np.square(directions).sum(1)[:, None, None]
    along = np.tensordot(directions, offset, 1)
    alphas = along / lengths
    clipped = np.clip(alphas, 0, 1)
    color = int((clipped * (clipped * lengths - 2 * along)).sum((1, 2)).argmin())
    weight = clipped[color] + 1e-3 * territory
    grid = np.arange(_GRID) + 0.5
    centroid = np.array([weight.sum(0) @ grid, weight.sum(1) @ grid]) / weight.sum()
    corner = np.rint(centroid).astype(int) - _WINDOW // 2
    padded = np.pad(alphas[color], _WINDOW // 2)
    x, y = corner + _WINDOW // 2
    target = _blur(padded[y : y + _WINDOW, x : x + _WINDOW])

    # Gauss-Newton on center and log radius: as they change, the template moves along with its gradient.
    centers, radii = (centroid - corner) - _CENTROIDS, np.array([radius for _, radius in _STARTS])
    templates = _templates(centers, radii)
    axis = np.arange(_WINDOW) + 0.5
    for _ in range(3):
        dy, dx = np.gradient(templates, axis=(1, 2))
        outward = dx * (axis - centers[:, :1, None]) + dy * (axis[:, None] - centers[:, 1:, None])
        slopes = np.stack([dx, dy, outward], 1).reshape(len(centers), 3, -1)
        error = (target - templates).reshape(len(centers), -1, 1)
        normal = slopes @ slopes.transpose(0, 2, 1) + 1e-6 * np.eye(3)
        step = -np.linalg.solve(normal, slopes @ error)[..., 0]
        centers = centers + np.clip(step[:, :2], -1, 1)
        radii = np.clip(radii * np.exp(np.clip(step[:, 2], -0.2, 0.2)), 2, 10)
        templates = _templates(centers, radii)
    # Each template may be softer than drawn, and is the less likely the farther its radius is from a size's.
    soft = _blur(templates)
    misfit = np.minimum(np.square(target - templates).sum((1, 2)), np.square(target - soft).sum((1, 2)))
    drift = radii - [radius for _, radius in _STARTS]
    best = int((misfit / np.square(target).sum() + _DRIFT_COST * np.square(drift)).argmin())
    center = (centers[best] + corner).astype(np.float32)
    return _Fit(_STARTS[best][0], tuple(COLORS)[color], center, float(radii[best]))


def _templates(centers: NDArray[np.float64], radii: NDArray[np.float64]) -> Array:
    """The window with the shape of each of `_STARTS`, blurred: centers (12, 2), radii (12,) -> (12, W, W)."""
    places = (centers / _WINDOW).astype(np.float32).reshape(len(SHAPES), -1, 2)
    sizes = (radii / _WINDOW).astype(np.float32).reshape(len(SHAPES), -1)
    parts = [coverage(shape, size, place, _WINDOW) for shape, size, place in zip(SHAPES, sizes, places)]
    return _blur(np.concatenate(parts))


# From an object's center to its center of mass, in pixels: (12, 2). Only the triangle's differ.
_CENTROIDS = np.array([(0.0, 0.289 * radius if shape == "triangle" else 0.0) for shape, radius in _STARTS])


def _scene(background: str, fits: list[_Fit]) -> Scene | None:
    """The scene of fitted objects, if their radii are those of the sizes.

    A pair is related along the axis in which it is farther apart.
    """
    axis = int(np.abs(fits[0].center - fits[-1].center).argmax())
    objects = []
    for fit in sorted(fits, key=lambda fit: float(fit.center[axis])):
        sizes = [size for size, radius in _RADII.items() if abs(fit.radius - radius) <= _MAX_RADIUS_ERROR]
        if not sizes:
            return None
        objects.append(Object(sizes[0], fit.color, fit.shape))
    return Scene(background, tuple(objects), RELATIONS[axis] if len(fits) == 2 else None)


def compare(expected: Scene, found: Scene | None) -> dict[str, bool | None]:
    """Which claims of a caption the picture keeps. All are False for an unreadable picture (`found` None).

    `shape`, `color`, `size`: as many objects of each kind, in any order. `relation`, None if the caption has
    one object: the same axis and order once the caption's objects are matched with the picture's so that most
    attributes agree (a tie keeps the relation). `all`: the scenes are equal.
    """
    related = expected.relation is not None
    if found is None:
        keys = ("all", "count", "shape", "color", "size", "background")
        return {**dict.fromkeys(keys, False), "relation": False if related else None}
    scores: dict[str, bool | None] = {
        attribute: Counter(getattr(thing, attribute) for thing in expected.objects)
        == Counter(getattr(thing, attribute) for thing in found.objects)
        for attribute in ("shape", "color", "size")
    }
    return {
        "all": expected == found,
        "count": len(expected.objects) == len(found.objects),
        **scores,
        "background": expected.background == found.background,
        "relation": _keeps_relation(expected, found) if related else None,
    }


def _keeps_relation(expected: Scene, found: Scene) -> bool:
    def agreement(pairs: Sequence[tuple[Object, Object]]) -> int:
        return sum((a.shape == b.shape) + (a.color == b.color) + (a.size == b.size) for a, b in pairs)

    straight = agreement(list(zip(expected.objects, found.objects)))
    crossed = agreement(list(zip(expected.objects, reversed(found.objects))))
    return found.relation == expected.relation and straight >= crossed


def prompt_check(captions: Sequence[str], images: _Pictures) -> list[dict[str, bool | None]]:
    """`compare` each caption with its picture, uint8 (N, 3, R, R); nothing applies to a caption of other things."""
    pixels = np.asarray(images)
    if len(captions) != len(pixels):
        raise ValueError(f"{len(captions)} captions for {len(pixels)} pictures")
    found = ShapesParser(pixels.shape[-1])(pixels)
    scenes = [parse_caption(text) for text in captions]
    return [{} if scene is None else compare(scene, read) for scene, read in zip(scenes, found, strict=True)]
