import pytest
import torch

from carrara.network.transformer import TextTransformer


def transformer() -> TextTransformer:
    return TextTransformer(vocab_size=50, max_length=10, width=16, depth=2, heads=2)


def test_padding_changes_nothing():
    model = transformer()
    ids = torch.randint(3, 50, (2, 5))
    tokens, pooled = model(ids, torch.ones(2, 5, dtype=torch.bool))
    padded = torch.cat([ids, torch.randint(3, 50, (2, 4))], dim=1)  # whatever stands there
    mask = torch.arange(9).expand(2, 9) < 5
    more, more_pooled = model(padded, mask)
    torch.testing.assert_close(more[:, :5], tokens, atol=1e-6, rtol=0)
    torch.testing.assert_close(more_pooled, pooled, atol=1e-6, rtol=0)


def test_the_order_of_the_words_changes_the_pooled_vector():
    model, mask = transformer(), torch.ones(1, 4, dtype=torch.bool)
    _, a = model(torch.tensor([[1, 5, 6, 2]]), mask)
    _, b = model(torch.tensor([[1, 6, 5, 2]]), mask)
    assert (a - b).abs().max() > 1e-4


def test_every_token_hears_of_every_other():
    model = transformer()
    mask = torch.ones(1, 6, dtype=torch.bool)
    ids = torch.arange(3, 9)[None]
    tokens, _ = model(ids, mask)
    other = ids.clone()
    other[0, 5] = 20
    changed, _ = model(other, mask)
    assert ((changed - tokens).abs().amax(-1) > 1e-5).all()  # also those before it


@pytest.mark.parametrize("ordered", [True, False])
def test_a_short_training_tells_a_sentence_from_its_reverse(ordered):
    """ "color shape · color shape": which shape comes first. Without the rotation it is a bag of words."""
    torch.manual_seed(0)
    model = TextTransformer(vocab_size=20, max_length=12, width=32, depth=2, heads=2)
    head = torch.nn.Linear(32, 6)
    if not ordered:
        model.angles.zero_()
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
    mask = torch.ones(64, 7, dtype=torch.bool)
    right = 0.0
    for step in range(300):
        colors, (first, second) = (
            torch.randint(0, 8, (2, 64)),
            torch.stack([torch.randperm(6)[:2] for _ in range(64)]).T,
        )
        start, middle, end = (torch.full((64,), k) for k in (17, 18, 19))
        ids = torch.stack([start, colors[0], 8 + first, middle, colors[1], 8 + second, end], dim=1)
        logits = head(model(ids, mask)[1])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, first).backward()
        optimizer.step()
        if step >= 280:
            right += float((logits.argmax(1) == first).float().mean()) / 20
    assert right > 0.95 if ordered else right < 0.6
