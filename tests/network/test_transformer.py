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
