"""Scenes, their pictures and their captions."""

import math

import numpy as np
import pytest
from scipy import ndimage

from carrara.data.shapes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    SHAPES,
    SIZES,
    Object,
    Scene,
    caption,
    coverage,
    examples,
    parse_caption,
    render,
)


def has_held_out(scene):
    return any((thing.shape, thing.color) in HELD_OUT for thing in scene.objects)


def test_held_out_combinations_still_occur_apart():
    assert len(HELD_OUT) >= 8
    for shape in SHAPES:
        assert sum(of == shape for of, _ in HELD_OUT) <= 2
    for color in COLORS:
        assert sum(of == color for _, of in HELD_OUT) == 1


def test_held_out_combinations_never_occur_in_training():
    scenes = examples(0, "train", range(5000)).scenes
    assert not any(has_held_out(scene) for scene in scenes)
    seen = {(thing.shape, thing.color) for scene in scenes for thing in scene.objects}
    assert len(seen) == 6 * 8 - len(HELD_OUT)
    assert {thing.size for scene in scenes for thing in scene.objects} == {"large", "small"}
    assert {scene.background for scene in scenes} == {"black", "white", "gray", "brown"}
    pairs = [scene for scene in scenes if len(scene.objects) == 2]
    assert all(scene.objects[0] != scene.objects[1] for scene in pairs)
    assert 0.57 < len(pairs) / len(scenes) < 0.63
    assert 0.45 < sum(scene.relation == "left" for scene in pairs) / len(pairs) < 0.55


def test_held_out_combinations_occur_in_every_held_out_scene():
    scenes = examples(0, "held_out", range(2000)).scenes
    assert all(has_held_out(scene) for scene in scenes)
    second = [s for s in scenes if len(s.objects) == 2 and (s.objects[1].shape, s.objects[1].color) in HELD_OUT]
    assert 0.2 < len(second) / 2000 < 0.4
    assert not any(has_held_out(scene) for scene in examples(0, "seen", range(1000)).scenes)


def test_pair_share():
    assert all(len(scene.objects) == 1 for scene in examples(3, "train", range(200), pair_share=0).scenes)
    assert all(len(scene.objects) == 2 for scene in examples(3, "held_out", range(200), pair_share=1).scenes)


def test_a_sample_depends_on_seed_split_and_index_only():
    together = examples(7, "train", range(40))
    alone = examples(7, "train", [33])
    assert np.array_equal(alone.images[0], together.images[33])
    assert alone.captions[0] == together.captions[33]
    first = together.captions[:20]
    assert examples(8, "train", range(20)).captions != first
    assert examples(7, "seen", range(20)).captions != first
    assert len(set(together.captions)) > 35


def test_samples_are_the_same_on_every_machine():
    assert examples(0, "train", [0, 3, 7]).captions == [
        "a drawing of a big orange diamond against white",
        "white background, a drawing of a large cyan ring",
        "white background, a drawing of a little orange circle, with a small pink ring on its right",
    ]


def test_colors_are_well_separated():
    palette = np.array([*COLORS.values(), *BACKGROUNDS.values()], float)
    distances = np.linalg.norm(palette[:, None] - palette[None], axis=-1)
    assert len(palette) == 12
    assert distances[~np.eye(12, dtype=bool)].min() > 110


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", math.pi),
        ("ring", 0.75 * math.pi),
        ("square", 1.76**2),
        ("diamond", 2.0),
        ("cross", 4 * 0.68 - 0.68**2),
        ("triangle", math.sqrt(3)),
    ],
)
def test_area_and_center_of_shapes(shape, area):
    radius = np.array([0.1, 0.2], np.float32)
    centers = np.array([[0.3, 0.62], [0.511, 0.45]], np.float32)
    alpha = coverage(shape, radius, centers, 128)
    assert alpha.shape == (2, 128, 128)
    np.testing.assert_allclose(alpha.sum((1, 2)) / 128**2, area * radius**2, rtol=0.01)
    rows, columns = np.nonzero(alpha[1] > 0.5)
    assert (columns.min() + columns.max() + 1) / 2 / 128 == pytest.approx(0.511, abs=1 / 128)
    assert (rows.min() + rows.max() + 1) / 2 / 128 == pytest.approx(0.45, abs=1 / 128)


def test_unknown_shape():
    with pytest.raises(ValueError, match="unknown shape 'star'"):
        coverage("star", np.ones(1, np.float32), np.zeros((1, 2), np.float32), 8)


def test_pixels_of_a_picture():
    scene = Scene("white", (Object("large", "green", "square"), Object("small", "red", "ring")), "left")
    image = render([scene], [np.array([[8 / 32, 16 / 32], [24 / 32, 12 / 32]])])[0]
    assert image.shape == (3, 32, 32)
    assert image.dtype == np.uint8
    assert tuple(image[:, 15, 7]) == COLORS["green"]
    assert tuple(image[:, 12, 24]) == BACKGROUNDS["white"]  # the hole of the ring
    assert tuple(image[:, 12, 21]) == COLORS["red"]  # its band, three pixels left of the center
    assert tuple(image[:, 0, 0]) == BACKGROUNDS["white"]
    # The square's left edge lies at 8 - 0.88 · 6.6 = 2.192: pixel 2 is covered by 0.808.
    expected = 0.808 * np.array(COLORS["green"]) + 0.192 * np.array(BACKGROUNDS["white"])
    np.testing.assert_allclose(image[:, 16, 2], expected, atol=1)


def test_objects_are_apart_inside_and_in_their_relation():
    areas = {"circle": math.pi, "ring": 0.75 * math.pi, "square": 1.76**2}
    areas |= {"diamond": 2.0, "cross": 4 * 0.68 - 0.68**2, "triangle": math.sqrt(3)}
    drawn = examples(1, "train", range(1500))
    for image, scene, centers in zip(drawn.images, drawn.scenes, drawn.centers):
        background = np.array(BACKGROUNDS[scene.background])
        difference = np.abs(image.astype(int) - background[:, None, None]).sum(0)
        labels, count = ndimage.label(difference > 0, np.ones((3, 3)))
        assert count == len(scene.objects)
        for thing, (x, y) in zip(scene.objects, centers * 32):
            # Not cut by the border: the picture shows the whole area of the object.
            radius = {"large": 6.6, "small": 4.0}[thing.size]
            rim = 0.75 * radius if thing.shape == "ring" else 0  # a ring is hollow at its center
            own = labels == labels[int(y), int(x + rim)]
            shown = difference[own].sum() / np.abs(np.array(COLORS[thing.color]) - background).sum()
            assert shown == pytest.approx(areas[thing.shape] * radius**2, rel=0.05)
        if scene.relation is not None:
            dx, dy = (centers[1] - centers[0]) * 32
            along, across = (dx, dy) if scene.relation == "left" else (dy, dx)
            assert along >= abs(across) + 3 - 1e-9
            first, second = (6.6 if thing.size == "large" else 4.0 for thing in scene.objects)
            assert along >= first + second + 2 - 1e-9


def test_a_larger_picture_shows_the_same():
    small = examples(2, "train", range(50), 32).images.astype(float)
    large = examples(2, "train", range(50), 96).images.astype(float)
    reduced = large.reshape(50, 3, 32, 3, 32, 3).mean((3, 5))
    assert np.abs(reduced - small).mean() < 1
    assert np.abs(reduced - small).max() < 50


A_RED_RING = Object("large", "red", "ring")
A_BLUE_CROSS = Object("small", "blue", "cross")
LEFT = Scene("gray", (A_RED_RING, A_BLUE_CROSS), "left")
ABOVE = Scene("gray", (A_RED_RING, A_BLUE_CROSS), "above")


@pytest.mark.parametrize(
    ("text", "scene"),
    [
        ("a large red ring on a black background", Scene("black", (A_RED_RING,))),
        ("Big Red Ring against Black.", Scene("black", (A_RED_RING,))),
        ("black background, the big red ring", Scene("black", (A_RED_RING,))),
        ("on a white background, a picture of a little blue cross", Scene("white", (A_BLUE_CROSS,))),
        ("an image of one small blue cross on brown", Scene("brown", (A_BLUE_CROSS,))),
        ("a large red ring to the left of a small blue cross on a gray background", LEFT),
        ("big red ring left of little blue cross against grey", LEFT),
        ("a small blue cross to the right of a large red ring on gray", LEFT),
        ("the small blue cross right of the large red ring against a gray background", LEFT),
        ("a small blue cross, with a large red ring on its left on a gray background", LEFT),
        ("gray background, a large red ring, with a small blue cross on its right", LEFT),
        ("a large red ring above a small blue cross on gray", ABOVE),
        ("a drawing of a large red ring over a small blue cross on gray", ABOVE),
        ("a small blue cross below a large red ring on gray", ABOVE),
        ("on a gray background, a small blue cross under a large red ring", ABOVE),
        ("a small blue cross, with a large red ring above it on gray", ABOVE),
        ("a large red ring, with a small blue cross below it against gray", ABOVE),
        (
            "a small blue cross to the left of a large red ring on gray",
            Scene("gray", (A_BLUE_CROSS, A_RED_RING), "left"),
        ),
    ],
)
def test_captions_read_as_a_person_reads_them(text, scene):
    assert parse_caption(text) == scene


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a large red ring",
        "a red ring on black",
        "a large ring on black",
        "a large red star on black",
        "a large black ring on red",
        "a large red ring beside a small blue cross on gray",
        "a large red ring on black and a cat",
        "white background, a large red ring on black",
        "a large red ring above on gray",
    ],
)
def test_other_captions_are_not_read(text):
    assert parse_caption(text) is None


def test_every_wording_is_read_back():
    rng = np.random.default_rng(0)
    scenes = examples(4, "seen", range(300)).scenes + examples(4, "held_out", range(300)).scenes
    for scene in scenes:
        for _ in range(5):
            text = caption(scene, rng)
            assert parse_caption(text) == scene, text
            assert parse_caption(text.upper()) == scene


def test_a_scene_has_many_wordings():
    rng = np.random.default_rng(0)
    captions = {caption(LEFT, rng) for _ in range(3000)}
    assert len(captions) > 500
    for phrase in (
        "to the left of",
        " left of",
        "to the right of",
        " right of",
        "on its left",
        "on its right",
    ):
        assert any(phrase in text for text in captions)
    assert not any(word in text for text in captions for word in ("above", "below", "over", "under"))


def test_the_order_of_the_words_carries_the_meaning():
    rng = np.random.default_rng(0)
    mirrored = Scene("gray", (A_BLUE_CROSS, A_RED_RING), "left")
    bags = [{tuple(sorted(caption(scene, rng).split())) for _ in range(3000)} for scene in (LEFT, mirrored)]
    assert len(bags[0] & bags[1]) > 0.5 * len(bags[0])


def test_impossible_scenes_are_refused():
    for objects, relation in [((), None), ((A_RED_RING,), "left"), ((A_RED_RING, A_BLUE_CROSS), None)]:
        with pytest.raises(ValueError, match="a scene has"):
            Scene("gray", objects, relation)
    assert len({LEFT, ABOVE, Scene("gray", (A_RED_RING, A_BLUE_CROSS), "left")}) == 2
    assert SIZES == ("large", "small")
