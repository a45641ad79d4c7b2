import pytest
import torch

from carrara.conditioner.text import Text
from carrara.model.conditioned import caption_mean
from carrara.network.caption_mean import CaptionMean
from carrara.network.conditioning import Conditioning
from tests.tiny import text


def test_it_learns_the_mean_of_each_captions_pictures():
    """Of noisy pictures, two told apart by the order of words alone; the least error is the noise's variance."""
    captions = ["a red left of blue", "a blue left of red", "a red right of blue", "a big ring"]
    torch.manual_seed(0)
    conditioner = Text(vocab_size=300, max_length=12, width=32, depth=2, heads=2)
    conditioner.tokenizer.train_on(captions)
    head = CaptionMean(3, 32, width=32, depth=1, heads=2)
    means = torch.randn(4, 3, 4, 4)
    optimizer = torch.optim.AdamW([*conditioner.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(300):
        rows = torch.randint(4, (32,))
        noise = 0.5 * torch.randn(32, 3, 8, 8)
        x0 = means[rows].repeat_interleave(2, 2).repeat_interleave(2, 3) + noise
        loss = head.squared_error(conditioner([captions[k] for k in rows]), x0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        guess = head(conditioner(captions))
    assert (guess - means).square().mean() < 0.01
    assert loss.item() == pytest.approx(0.5**2 / 4, rel=0.3)  # a cell averages four pixels


def test_the_error_is_against_the_average_of_each_cell():
    head = CaptionMean(2, 8, width=16, depth=1, heads=2)
    with torch.no_grad():
        for p in head.out.parameters():
            p.zero_()
    x0 = torch.randn(3, 2, 8, 8)
    cells = x0.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5))
    torch.testing.assert_close(head.squared_error(text()(["a", "b", ""]), x0), cells.square().mean((1, 2, 3)))


def test_padding_changes_nothing():
    head = CaptionMean(3, 8, width=16, depth=2, heads=2)
    alone = text()(["a big red disc"])
    padded = Conditioning(
        torch.nn.functional.pad(alone.tokens, (0, 0, 0, 5), value=3.0),
        torch.nn.functional.pad(alone.mask, (0, 5)),
        alone.pooled,
    )
    torch.testing.assert_close(head(padded), head(alone), atol=1e-6, rtol=0)


def test_there_is_one_only_for_a_text_that_learns():
    assert isinstance(caption_mean(3, text(), 1.0), CaptionMean)
    assert caption_mean(3, text(), 0.0) is None
    assert caption_mean(3, text().requires_grad_(False), 1.0) is None
