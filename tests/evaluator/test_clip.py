import inspect
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from carrara.data.shapes import examples
from carrara.evaluator.clip import CLIP, ImageTower, info_nce
from tests.tiny import CAPTIONS, clip

DEMO = Path(__file__).parents[2] / "conf" / "size" / "demo.yaml"


@torch.no_grad()
def test_the_first_loss_is_the_logarithm_of_the_batch():
    """At the demo's size: before training the evaluator prefers no caption by much."""
    size = yaml.safe_load(DEMO.read_text())["evaluator"]
    evaluator = CLIP(**{name: size[name] for name in inspect.signature(CLIP).parameters})
    shapes = examples(0, "train", range(128))
    evaluator.tokenizer.train_on(shapes.captions)
    image = evaluator.embed_images(torch.from_numpy(shapes.images).float() / 127.5 - 1)
    loss = info_nce(image, evaluator.embed_texts(shapes.captions), evaluator.log_temperature)
    assert float(loss) == pytest.approx(math.log(128), rel=0.1)


def test_info_nce_is_the_mean_of_both_directions():
    image, text = torch.randn(5, 7), torch.randn(5, 7)
    logits = F.cosine_similarity(image[:, None], text[None], dim=2) / 0.2
    wanted = 0.0
    for k in range(5):
        wanted -= float(logits[k].log_softmax(0)[k] + logits[:, k].log_softmax(0)[k]) / 10
    assert float(info_nce(image, text, torch.tensor(math.log(0.2)))) == pytest.approx(wanted, rel=1e-5)


def test_info_nce_of_embeddings_that_tell_nothing_is_the_logarithm():
    same = torch.ones(8, 4)
    assert float(info_nce(same, same, torch.tensor(math.log(0.07)))) == pytest.approx(math.log(8))


def test_matching_pairs_score_better_than_shuffled_ones():
    image = torch.randn(8, 16)
    temperature = torch.tensor(math.log(0.07))
    assert info_nce(image, image, temperature) < 0.1 < 2 < info_nce(image, image.roll(1, 0), temperature)


def test_pictures_of_another_size_are_resized():
    evaluator = clip(resolution=8).eval()
    images = F.interpolate(torch.rand(2, 3, 4, 4) * 2 - 1, size=(8, 8), mode="bicubic").clamp(-1, 1)
    large = F.interpolate(images, size=(32, 32), mode="bicubic", antialias=True).clamp(-1, 1)
    a, b = evaluator.embed_images(images), evaluator.embed_images(large)
    other = evaluator.embed_images(images.roll(1, 0))
    assert (a - b).norm() < 0.2 * (a - other).norm()


def test_a_wide_picture_is_resized():
    assert clip(resolution=8).embed_images(torch.rand(1, 3, 8, 16)).shape == (1, 16)


def test_each_picture_and_caption_has_its_own_embedding():
    evaluator = clip().eval()
    images = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(evaluator.embed_images(images)[1:2], evaluator.embed_images(images[1:2]))
    texts = evaluator.embed_texts(CAPTIONS[:3])
    torch.testing.assert_close(texts[1:2], evaluator.embed_texts(CAPTIONS[1:2]))
    assert (texts[0] - texts[1]).abs().max() > 1e-4


@pytest.mark.parametrize(("resolution", "patch"), [(8, 3), (12, 8), (8, 1), (8, 0)])
def test_patches_must_fit(resolution, patch):
    with pytest.raises(ValueError, match=rf"patch={patch} must be a power of two from 2 on that divides {resolution}"):
        ImageTower(resolution, patch, width=16, depth=1, heads=2)


def test_the_loss_is_in_float32_under_autocast():
    """bfloat16 has steps of 1/2 where the logits of a sure model are."""
    torch.manual_seed(0)
    image = torch.randn(64, 32)
    text, log_temperature = image + 3 * torch.randn(64, 32), torch.tensor(0.01).log()
    wanted = info_nce(image, text, log_temperature)
    assert wanted > 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(info_nce(image, text, log_temperature), wanted)
