"""The parser reads pictures of shapes exactly, forgives what an auto-encoder does, and refuses the rest."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

from carrara.data.shapes import (
    BACKGROUNDS,
    COLORS,
    Object,
    Scene,
    examples,
    random_centers,
    random_scene,
    render,
)
from carrara.data.shapes_parser import ShapesParser, compare, prompt_check

RED_RING = Object("large", "red", "ring")
BLUE_CROSS = Object("small", "blue", "cross")
LEFT = Scene("gray", (RED_RING, BLUE_CROSS), "left")


def share_right(found, scenes):
    return np.mean([reading == scene for reading, scene in zip(found, scenes)])


def share_unreadable(found):
    return np.mean([reading is None for reading in found])


def to_uint8(images):
    return np.clip(np.rint(images), 0, 255).astype(np.uint8)


def jpeg(image):
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "JPEG", quality=90)
    return np.asarray(Image.open(buffer)).transpose(2, 0, 1)


@pytest.mark.parametrize(("resolution", "count"), [(32, 600), (40, 200), (64, 400)])
def test_reads_held_out_pictures(resolution, count):
    drawn = examples(11, "held_out", range(count), resolution)
    assert share_right(ShapesParser(resolution)(drawn.images), drawn.scenes) >= 0.995


def test_reads_pictures_that_another_program_drew():
    image = Image.new("RGB", (256, 256), (248, 244, 244))
    pen = ImageDraw.Draw(image)
    pen.ellipse((30 - 32 + 40, 128 - 32, 30 + 32 + 40, 128 + 32), fill=(250, 128, 15))  # radius 4 · 8 around (70, 128)
    pen.polygon([(180, 150 - 53), (180 + 53, 150), (180, 150 + 53), (180 - 53, 150)], fill=(26, 68, 234))  # 6.6 · 8
    pixels = np.asarray(image).transpose(2, 0, 1)[None]
    expected = Scene("white", (Object("small", "orange", "circle"), Object("large", "blue", "diamond")), "left")
    assert ShapesParser(256)(pixels) == [expected]
    turned = np.rot90(pixels, -1, axes=(2, 3))  # clockwise: what was left is above
    assert ShapesParser(256)(turned) == [Scene("white", expected.objects, "above")]
    half = np.asarray(image.resize((128, 128), Image.Resampling.BOX)).transpose(2, 0, 1)[None]
    assert ShapesParser(128)(half) == [expected]


@pytest.mark.parametrize("sigma", [0.5, 0.7])
def test_forgives_blur_and_noise(sigma):
    drawn = examples(12, "held_out", range(400))
    noise = np.random.default_rng(0).normal(0, 8, drawn.images.shape)
    degraded = to_uint8(ndimage.gaussian_filter(drawn.images.astype(float), (0, 0, sigma, sigma)) + noise)
    assert share_right(ShapesParser(32)(degraded), drawn.scenes) >= 0.99


def test_strong_blur_is_seldom_misread():
    drawn = examples(12, "held_out", range(400))
    noise = np.random.default_rng(0).normal(0, 8, drawn.images.shape)
    found = ShapesParser(32)(to_uint8(ndimage.gaussian_filter(drawn.images.astype(float), (0, 0, 1, 1)) + noise))
    assert share_right(found, drawn.scenes) >= 0.92
    misread = [reading not in (None, scene) for reading, scene in zip(found, drawn.scenes)]
    assert np.mean(misread) <= 0.02


def test_forgives_jpeg():
    drawn = examples(12, "held_out", range(400))
    found = ShapesParser(32)(np.stack([jpeg(image) for image in drawn.images]))
    assert share_right(found, drawn.scenes) >= 0.97


@pytest.mark.parametrize("resolution", [32, 64])
def test_noise_is_unreadable(resolution):
    rng = np.random.default_rng(1)
    parser = ShapesParser(resolution)
    shape = (120, 3, resolution, resolution)
    assert share_unreadable(parser(rng.integers(0, 256, shape, np.uint8))) >= 0.99
    for deviation in (5, 20, 64, 128):
        assert share_unreadable(parser(to_uint8(rng.normal(128, deviation, shape)))) >= 0.99
    clouds = ndimage.gaussian_filter(rng.normal(0, 1, shape), (0, 0, resolution / 12, resolution / 12))
    assert share_unreadable(parser(to_uint8(128 + 60 * clouds / clouds.std()))) >= 0.99


@pytest.mark.parametrize("resolution", [32, 64])
@pytest.mark.parametrize("same_background", [False, True])
def test_blends_are_unreadable(resolution, same_background):
    drawn = examples(13, "held_out", range(400), resolution)
    rng = np.random.default_rng(2)
    others = []
    for scene in drawn.scenes:
        other = random_scene(rng, held_out=True)
        background = scene.background if same_background else other.background
        others.append(Scene(background, other.objects, other.relation))
    images = render(others, [random_centers(other, rng) for other in others], resolution)
    blends = ((drawn.images.astype(int) + images + 1) // 2).astype(np.uint8)
    different = np.array([scene != other for scene, other in zip(drawn.scenes, others)])
    assert share_unreadable(ShapesParser(resolution)(blends[different])) >= 0.99


def filled(color):
    """(3, 1, 1) of an RGB color."""
    return np.array(color, np.uint8)[:, None, None]


def test_plain_and_crowded_pictures_are_unreadable():
    plain = np.stack([np.tile(filled(color), (1, 32, 32)) for color in BACKGROUNDS.values()])
    assert ShapesParser(32)(plain) == [None] * 4
    image = render([LEFT], [np.array([[0.25, 0.3], [0.8, 0.3]])])
    assert ShapesParser(32)(image) == [LEFT]
    three = image.copy()
    three[0, :, 22:30, 12:20] = filled(COLORS["green"])
    assert ShapesParser(32)(three) == [None]
    half = image.copy()
    half[0, :, :, 25:] = filled(BACKGROUNDS["gray"])  # half of the cross wiped out
    assert ShapesParser(32)(half) == [None]


def test_squares_are_read_in_their_two_sizes_only():
    image = np.tile(filled(BACKGROUNDS["black"]), (1, 32, 32))
    readings = {}
    for side in range(2, 25):
        picture = image.copy()
        picture[:, 4 : 4 + side, 4 : 4 + side] = filled(COLORS["green"])
        readings[side] = ShapesParser(32)(picture[None])[0]
    # They are drawn with sides of 2 · 0.88 · 4 = 7.0 and 2 · 0.88 · 6.6 = 11.6 pixels.
    small, large = (Scene("black", (Object(size, "green", "square"),)) for size in ("small", "large"))
    assert [side for side, reading in readings.items() if reading == small] == [6, 7, 8]
    assert [side for side, reading in readings.items() if reading == large] == [11, 12, 13]
    assert all(reading is None for side, reading in readings.items() if not 6 <= side <= 13)


def test_other_colors_and_shapes_are_unreadable():
    image = np.tile(filled(BACKGROUNDS["black"]), (1, 32, 32))
    mixed = image.copy()
    mixed[:, 4:11, 4:11] = filled((135, 160, 60))  # between green, orange and yellow
    bar = image.copy()
    bar[:, 10:14, 4:18] = filled(COLORS["pink"])
    corner = image.copy()
    corner[:, 4:16, 4:16] = filled(COLORS["pink"])
    corner[:, 4:10, 4:10] = filled(BACKGROUNDS["black"])
    two_tone = image.copy()
    two_tone[:, 4:16, 4:10] = filled(COLORS["pink"])
    two_tone[:, 4:16, 10:16] = filled(COLORS["cyan"])
    faint_bar = np.tile(filled(BACKGROUNDS["gray"]), (1, 32, 32))
    faint_bar[:, 10:18, 8:12] = filled(COLORS["purple"])
    pictures = np.stack([mixed, bar, corner, two_tone, faint_bar])
    assert ShapesParser(32)(pictures) == [None] * 5


def test_a_changed_picture_reads_as_changed():
    gray, white = filled(BACKGROUNDS["gray"]).astype(float), filled(BACKGROUNDS["white"])
    image = render([LEFT], [np.array([[0.25, 0.3], [0.8, 0.35]])])
    # How much of each pixel the objects cover: the ring in the left half, the cross in the right half.
    colors = np.concatenate(
        [np.tile(filled(COLORS["red"]), (1, 32, 16)), np.tile(filled(COLORS["blue"]), (1, 32, 16))], 2
    )
    alpha = np.abs(image[0] - gray).sum(0) / np.abs(colors - gray).sum(0)
    recolored = image.copy()
    recolored[0, :, :, 16:] = (gray + alpha * (filled(COLORS["cyan"]) - gray))[:, :, 16:]
    lighter = (white + alpha * (colors - white.astype(float)))[None].astype(np.uint8)
    erased = image.copy()
    erased[0, :, :, 16:] = filled(BACKGROUNDS["gray"])
    mirrored = image[..., ::-1]
    turned = image.transpose(0, 1, 3, 2)
    found = ShapesParser(32)(np.concatenate([recolored, lighter, erased, mirrored, turned]))
    assert found == [
        Scene("gray", (RED_RING, Object("small", "cyan", "cross")), "left"),
        Scene("white", (RED_RING, BLUE_CROSS), "left"),
        Scene("gray", (RED_RING,)),
        Scene("gray", (BLUE_CROSS, RED_RING), "left"),
        Scene("gray", (RED_RING, BLUE_CROSS), "above"),
    ]


def test_takes_tensors_and_refuses_other_inputs():
    drawn = examples(14, "train", range(3))
    assert ShapesParser(32)(torch.from_numpy(drawn.images)) == drawn.scenes
    assert ShapesParser(32)(drawn.images[:0]) == []
    with pytest.raises(ValueError, match=r"expected uint8 images \(N, 3, 32, 32\), got float32"):
        ShapesParser(32)(drawn.images.astype(np.float32))
    with pytest.raises(ValueError, match=r"\(N, 3, 64, 64\), got uint8 \(3, 3, 32, 32\)"):
        ShapesParser(64)(drawn.images)
    with pytest.raises(ValueError, match="32 pixels or more, not 16"):
        ShapesParser(16)


def scores(found, expected=LEFT):
    return {name for name, kept in compare(expected, found).items() if kept}


EVERYTHING = {"all", "count", "shape", "color", "size", "relation", "background"}


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        (LEFT, EVERYTHING),
        (None, set()),
        (Scene("gray", (BLUE_CROSS, RED_RING), "left"), EVERYTHING - {"all", "relation"}),
        (Scene("gray", (RED_RING, BLUE_CROSS), "above"), EVERYTHING - {"all", "relation"}),
        (Scene("black", (RED_RING, BLUE_CROSS), "left"), EVERYTHING - {"all", "background"}),
        (Scene("gray", (RED_RING,)), {"background"}),
        # Attributes swapped between the objects: each multiset is kept, the scene is not.
        (
            Scene("gray", (Object("large", "blue", "ring"), Object("small", "red", "cross")), "left"),
            EVERYTHING - {"all"},
        ),
        (
            Scene("gray", (Object("large", "red", "ring"), Object("small", "green", "cross")), "left"),
            EVERYTHING - {"all", "color"},
        ),
        # One wrong color, and the order is turned round.
        (
            Scene("gray", (Object("small", "green", "cross"), Object("large", "red", "ring")), "left"),
            {"count", "shape", "size", "background"},
        ),
    ],
)
def test_compare(found, kept):
    assert scores(found) == kept
    assert compare(LEFT, found).keys() == EVERYTHING


def test_relation_is_not_judged_for_one_object():
    one = Scene("gray", (RED_RING,))
    assert compare(one, one) == {**dict.fromkeys(EVERYTHING, True), "relation": None}
    assert compare(one, None) == {**dict.fromkeys(EVERYTHING, False), "relation": None}
    assert scores(LEFT, one) == {"background"}


def test_prompt_check():
    drawn = examples(15, "held_out", range(40))
    assert all(score["all"] for score in prompt_check(drawn.captions, drawn.images))
    turned = prompt_check(drawn.captions[1:] + drawn.captions[:1], drawn.images)
    assert sum(bool(score["all"]) for score in turned) <= 1
    assert prompt_check(["a cat"], drawn.images[:1]) == [{}]
    with pytest.raises(ValueError, match="2 captions for 1 pictures"):
        prompt_check(["a cat"] * 2, drawn.images[:1])
