"""Captioned shapes: small scenes whose picture and caption say exactly the same thing.

A `Scene` is a background and one or two objects; an object is a size, a color and a shape. Pictures are drawn
from vector shapes with anti-aliased edges, so any resolution shows the same scene. Captions say every
attribute, in many wordings; in a pair the order of the words carries the meaning. Some combinations of shape
and color (`HELD_OUT`) never occur in training: a validation caption asks for something new in known words.

Everything is a pure function of (seed, split, index).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "held_out", "seen"]

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
RELATIONS = ("left", "above")
# sRGB. Any two of these twelve are at least 114 apart (of 442): none passes for another.
COLORS = {
    "red": (221, 20, 55),
    "orange": (250, 128, 15),
    "yellow": (240, 240, 62),
    "green": (24, 175, 60),
    "cyan": (50, 212, 240),
    "blue": (26, 68, 234),
    "purple": (136, 32, 180),
    "pink": (250, 115, 178),
}
BACKGROUNDS = {
    "black": (12, 12, 26),
    "white": (248, 244, 244),
    "gray": (122, 138, 138),
    "brown": (112, 76, 22),
}
# Half the side of the square around an object, as a fraction of the picture's side: 6.6 and 4 pixels of 32.
RADII = {"large": 6.6 / 32, "small": 4.0 / 32}
SIZES = tuple(RADII)

_BORDER = 0.4 / 32  # between an object and the picture's edge
_GAP = 2.0 / 32  # between two objects, along the axis of their relation
_SLANT = 0.7  # the displacement across that axis is at most this share of the one along it

# (shape, color) pairs kept out of training: a diagonal, so that every shape and every color still occurs.
HELD_OUT = frozenset((SHAPES[i % len(SHAPES)], color) for i, color in enumerate(COLORS))
_PAIRS = tuple((shape, color) for shape in SHAPES for color in COLORS)
_UNSEEN = tuple(pair for pair in _PAIRS if pair in HELD_OUT)
_SEEN = tuple(pair for pair in _PAIRS if pair not in HELD_OUT)


@dataclass(frozen=True)
class Object:
    """One shape: `size` of `SIZES`, `color` of `COLORS`, `shape` of `SHAPES`."""

    size: str
    color: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows: its background (of `BACKGROUNDS`) and one or two objects.

    With two objects, `relation` says that the first is "left" of the second or "above" it, so that
    a scene has one spelling only; with one object it is None.
    """

    background: str
    objects: tuple[Object, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        if len(self.objects) not in (1, 2) or (self.relation in RELATIONS) != (len(self.objects) == 2):
            raise ValueError(f"a scene has one object and no relation, or two and one of {RELATIONS}: {self}")


@dataclass(frozen=True)
class Examples:
    """Samples: uint8 images (N, 3, R, R), captions, scenes and the objects' centers (x, y) in [0, 1]."""

    images: NDArray[np.uint8]
    captions: list[str]
    scenes: list[Scene]
    centers: list[NDArray[np.float64]]


# ------------------------------------------------------------------------------------------ sampling


def random_scene(rng: np.random.Generator, held_out: bool = False, pair_share: float = 0.6) -> Scene:
    """A random scene, with two objects with probability `pair_share`.

    Without `held_out` no object is one of `HELD_OUT`; with it exactly one is, in either place.
    The objects of a pair differ.
    """
    count = 2 if rng.random() < pair_share else 1
    special = int(rng.integers(count)) if held_out else -1
    objects: list[Object] = []
    while len(objects) < count:
        choices = _UNSEEN if len(objects) == special else _SEEN
        shape, color = choices[rng.integers(len(choices))]
        thing = Object(SIZES[rng.integers(len(SIZES))], color, shape)
        if thing not in objects:
            objects.append(thing)
    background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    return Scene(background, tuple(objects), RELATIONS[rng.integers(2)] if count == 2 else None)


def random_centers(scene: Scene, rng: np.random.Generator) -> NDArray[np.float64]:
    """Where the objects of `scene` lie: (number of objects, 2), x and y from the top left corner in [0, 1].

    No object is cut by the border, two objects keep a gap, and their relation is unmistakable.
    """
    margins = [RADII[thing.size] + _BORDER for thing in scene.objects]
    if scene.relation is None:
        return rng.uniform(margins[0], 1 - margins[0], (1, 2))
    first, second = margins
    shortest = first + second - 2 * _BORDER + _GAP
    distance = rng.uniform(shortest, 1 - first - second)
    start = rng.uniform(first, 1 - second - distance)
    across = rng.uniform(first, 1 - first)
    reach = _SLANT * distance
    other = rng.uniform(max(second, across - reach), min(1 - second, across + reach))
    centers = np.array([[start, across], [start + distance, other]])
    return centers if scene.relation == "left" else centers[:, ::-1].copy()


def examples(
    seed: int, split: Split, indices: Iterable[int], resolution: int = 32, pair_share: float = 0.6
) -> Examples:
    """The samples `indices` of a split; each depends on (seed, split, its index) and `pair_share` only.

    "train" and "seen" draw from the same combinations, without `HELD_OUT`; every scene of "held_out" has one.
    """
    scenes, centers, captions = [], [], []
    for index in indices:
        rng = np.random.Generator(np.random.PCG64((seed, get_args(Split).index(split), index)))
        scene = random_scene(rng, split == "held_out", pair_share)
        scenes.append(scene)
        centers.append(random_centers(scene, rng))
        captions.append(caption(scene, rng))
    return Examples(render(scenes, centers, resolution), captions, scenes, centers)


# ------------------------------------------------------------------------------------------ pictures


def coverage(
    shape: str, radius: NDArray[np.float32], centers: NDArray[np.float32], resolution: int
) -> NDArray[np.float32]:
    """How much of each pixel a shape covers: (N, R, R) in [0, 1].

    `radius` (N,) and `centers` (N, 2), x and y, are fractions of the picture's side. The distance to the
    outline in pixels (the largest over half-planes, hence sharp corners) is clipped to one pixel; that is
    the exact area for edges along the axes.
    """
    grid = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution
    x = grid[None, None, :] - centers[:, 0, None, None]
    y = grid[None, :, None] - centers[:, 1, None, None]
    r = radius[:, None, None]
    match shape:  # additions, products and roots only: the same bits on every machine
        case "circle":
            distance = np.sqrt(x * x + y * y) - r
        case "ring":
            distance = np.abs(np.sqrt(x * x + y * y) - 0.75 * r) - 0.25 * r
        case "square":
            distance = np.maximum(np.abs(x), np.abs(y)) - 0.88 * r
        case "diamond":
            distance = (np.abs(x) + np.abs(y) - r) * np.float32(0.5**0.5)
        case "cross":
            x, y = np.abs(x), np.abs(y)
            distance = np.maximum(np.maximum(x, y) - r, np.minimum(x, y) - 0.34 * r)
        case "triangle":  # equilateral, apex up: half its width is r, half its height 0.866 r
            slanted = (3**0.5 * np.abs(x) - y) * 0.5 - 0.433 * r
            distance = np.maximum(slanted, y - 0.866 * r)
        case _:
            raise ValueError(f"unknown shape {shape!r}: one of {SHAPES}")
    covered: NDArray[np.float32] = np.clip(0.5 - distance * resolution, 0, 1).astype(np.float32)
    return covered


def render(scenes: Sequence[Scene], centers: Sequence[NDArray[np.float64]], resolution: int = 32) -> NDArray[np.uint8]:
    """Draw scenes: uint8 (N, 3, R, R), RGB. `centers[k]` is (objects, 2), as `random_centers` gives."""
    background = np.array([BACKGROUNDS[scene.background] for scene in scenes], np.float32).reshape(-1, 3)
    images = np.tile(background[:, :, None, None], (1, 1, resolution, resolution))
    # Objects never overlap, so that the order of drawing does not matter and each shape is drawn in one go.
    for shape in SHAPES:
        for place in (0, 1):
            rows = [k for k, s in enumerate(scenes) if [o.shape for o in s.objects][place : place + 1] == [shape]]
            if not rows:
                continue
            things = [scenes[k].objects[place] for k in rows]
            radius = np.array([RADII[thing.size] for thing in things], np.float32)
            middle = np.array([centers[k][place] for k in rows], np.float32)
            color = np.array([COLORS[thing.color] for thing in things], np.float32)[:, :, None, None]
            alpha = coverage(shape, radius, middle, resolution)[:, None]
            images[rows] += alpha * (color - images[rows])
    return np.rint(images).astype(np.uint8)


# ------------------------------------------------------------------------------------------ captions

_SIZE_WORDS = {"large": "large", "big": "large", "small": "small", "little": "small"}
_ARTICLES = ("a ", "a ", "the ", "")
_OPENINGS = ("", "", "a picture of ", "an image of ", "a drawing of ")
_ENDINGS = ("{} on a {} background", "{} against a {} background", "{} on {}", "{} against {}")
_BEGINNINGS = ("{} background, {}", "on a {} background, {}")
# A is the object that lies left or above, B the other.
_PAIR_WORDINGS = {
    "left": (
        "{A} to the left of {B}",
        "{A} left of {B}",
        "{B} to the right of {A}",
        "{B} right of {A}",
        "{B}, with {A} on its left",
        "{A}, with {B} on its right",
    ),
    "above": (
        "{A} above {B}",
        "{A} over {B}",
        "{B} below {A}",
        "{B} under {A}",
        "{B}, with {A} above it",
        "{A}, with {B} below it",
    ),
}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the many captions of `scene`, in lower case. `parse_caption` is its inverse."""

    def pick(choices: Sequence[str]) -> str:
        return choices[int(rng.integers(len(choices)))]

    article = pick(_ARTICLES)
    phrases = []
    for thing in scene.objects:
        size = pick([word for word, size in _SIZE_WORDS.items() if size == thing.size])
        phrases.append(f"{article}{size} {thing.color} {thing.shape}")
    core = phrases[0]
    if scene.relation is not None:
        core = pick(_PAIR_WORDINGS[scene.relation]).format(A=phrases[0], B=phrases[1])
    core = pick(_OPENINGS) + core
    if rng.random() < 0.3:
        return pick(_BEGINNINGS).format(scene.background, core)
    return pick(_ENDINGS).format(core, scene.background)


def _named(pattern: str, name: str) -> str:
    """The pattern of an object with its three attributes in groups called after `name`."""
    return pattern.format(n=name)


_OBJECT = (
    rf"(?:(?:an?|the|one) )?(?P<{{n}}size>{'|'.join(_SIZE_WORDS)}) (?P<{{n}}color>{'|'.join(COLORS)})"
    rf" (?P<{{n}}shape>{'|'.join(SHAPES)})"
)
_BACKGROUND = rf"({'|'.join(BACKGROUNDS)}|grey)"
_FRAMES = (
    re.compile(rf"(?P<core>.+) (?:on|against) (?:(?:an?|the) )?(?P<bg>{_BACKGROUND})(?: background)?"),
    re.compile(rf"(?:on (?:an? |the )?)?(?P<bg>{_BACKGROUND}) background, (?P<core>.+)"),
)
_OPENING = re.compile("(?:(?:an? |the )?(?:picture|image|drawing) of )?")
_CORES = [(re.compile(_named(_OBJECT, "A")), None)] + [
    (re.compile(wording.format(A=_named(_OBJECT, "A"), B=_named(_OBJECT, "B"))), relation)
    for relation, wordings in _PAIR_WORDINGS.items()
    for wording in wordings
]


def parse_caption(text: str) -> Scene | None:
    """The scene that a caption describes, whatever its wording and case; None if it is not one of ours."""
    text = " ".join(text.lower().split()).removesuffix(".")
    for frame in _FRAMES:
        framed = frame.fullmatch(text)
        if framed is None:
            continue
        core = framed["core"]
        opening = _OPENING.match(core)
        core = core[opening.end() :] if opening else core
        for pattern, relation in _CORES:
            found = pattern.fullmatch(core)
            if found is not None:
                objects = tuple(
                    Object(_SIZE_WORDS[found[name + "size"]], found[name + "color"], found[name + "shape"])
                    for name in ("A", "B")[: 1 if relation is None else 2]
                )
                return Scene(framed["bg"].replace("grey", "gray"), objects, relation)
    return None
