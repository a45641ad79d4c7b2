import pytest
import torch

from carrara.metric.prompt_accuracy import KEYS, PromptAccuracy

IMAGES = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)


def test_shares_are_over_the_pictures_a_key_applies_to():
    answers: list[dict[str, bool | None]] = [
        {"all": True, "color": True, "count": None},
        {"all": False, "color": False, "shape": True},
        {"all": False, "shape": False, "color": True},
        {"all": True},
    ]
    metric = PromptAccuracy(lambda captions, images: [answers[int(caption)] for caption in captions])
    metric.update(["0", "1"], IMAGES[:2])
    metric.update(["2", "3"], IMAGES[2:])
    shares = metric.compute()
    assert {key: float(value) for key, value in shares.items()} == pytest.approx(
        {"all": 0.5, "shape": 0.5, "color": 2 / 3}
    )
    assert all(value.dtype == torch.float64 and value.shape == () for value in shares.values())
    assert metric.counts == {"all": 4, "shape": 2, "color": 3}
    assert set(shares) < set(KEYS)


def test_no_pictures_are_no_shares():
    metric = PromptAccuracy(lambda captions, images: [])
    metric.update([], IMAGES[:0])
    assert metric.compute() == {}


def test_mistakes_of_the_caller_are_errors():
    with pytest.raises(ValueError, match="uint8"):
        PromptAccuracy(lambda captions, images: [{}] * 4).update(["a"] * 4, IMAGES.float())
    with pytest.raises(ValueError, match="as many captions"):
        PromptAccuracy(lambda captions, images: [{}] * 4).update(["a"] * 3, IMAGES)
    with pytest.raises(ValueError, match=r"unknown keys \{'colour'\}"):
        PromptAccuracy(lambda captions, images: [{"colour": True}] * 4).update(["a"] * 4, IMAGES)
    with pytest.raises(ValueError, match="3 of 4"):
        PromptAccuracy(lambda captions, images: [{}] * 3).update(["a"] * 4, IMAGES)
