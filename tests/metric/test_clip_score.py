import pytest
import torch

from carrara.metric.clip_score import CLIPScore, clip_scores


def test_known_angles():
    images = torch.tensor([[2.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    texts = torch.tensor([[5.0, 0.0], [0.0, 3.0], [0.0, 1.0], [-1.0, 0.0]])
    expected = [
        100.0,
        100 / 2**0.5,
        0.0,
        0.0,
    ]  # a negative cosine counts as 0, in its pair and not in the mean
    assert clip_scores(images, texts).tolist() == pytest.approx(expected)
    metric = CLIPScore()
    metric.update(images[:1], texts[:1])
    metric.update(images[1:], texts[1:])
    assert metric.compute().dtype == torch.float64
    assert float(metric.compute()) == pytest.approx(sum(expected) / 4)


def test_matched_pairs_beat_mismatched_ones_and_corruption_lowers_the_score():
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(200, 32, generator=generator)
    images = texts + torch.randn(200, 32, generator=generator)
    noise = torch.randn(200, 32, generator=generator)
    assert (clip_scores(images, texts) > clip_scores(images, texts.roll(1, 0))).double().mean() >= 0.95
    levels = [clip_scores(images, texts + level * noise).mean().item() for level in (0, 0.5, 1, 2, 4)]
    assert levels == sorted(levels, reverse=True)
