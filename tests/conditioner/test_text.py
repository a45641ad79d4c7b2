import torch

from carrara.conditioner.text import Text, Unconditional
from tests.tiny import awake, text, unet

CAPTION = "a big red disc"


def test_captions_become_tokens_and_their_mean():
    conditioning = text()([CAPTION, ""])
    assert conditioning.tokens.shape[0] == 2 and conditioning.tokens.shape[2] == 8
    assert conditioning.mask[0].all() and conditioning.mask[1].sum() == 2  # start and end
    torch.testing.assert_close(conditioning.pooled[0], conditioning.tokens[0].mean(0))
    torch.testing.assert_close(conditioning.pooled[1], conditioning.tokens[1, :2].mean(0))


def test_a_caption_means_the_same_in_any_batch():
    conditioner = text()
    together, alone = conditioner([CAPTION, "", "a small white cube"]), conditioner([""])
    torch.testing.assert_close(together.tokens[1, :2], alone.tokens[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(together.pooled[1:2], alone.pooled, atol=1e-6, rtol=0)


def test_the_order_of_words_reaches_the_noise_predictor():
    """Nothing but the text encoder's positions tells "red left of blue" from "blue left of red"."""
    conditioner, network = text(), awake(unet(pooled_width=0))
    x, time = torch.randn(1, 3, 8, 8), torch.tensor([500.0])
    a, b = (network(x, time, conditioner([c])) for c in ("red big blue", "blue big red"))
    assert (a - b).abs().max() > 1e-4
    with torch.no_grad():
        conditioner.transformer.angles.zero_()
    a, b = (network(x, time, conditioner([c])) for c in ("red big blue", "blue big red"))
    assert (a - b).abs().max() < 1e-5


def test_the_vocabulary_lies_in_the_state():
    conditioner, other = text(), Text(vocab_size=300, max_length=12, width=8, depth=1, heads=2)
    other.load_state_dict(conditioner.state_dict())
    assert torch.equal(other([CAPTION]).tokens, conditioner([CAPTION]).tokens)


def test_without_captions_there_is_one_learned_token():
    conditioner = Unconditional(8)
    a, b = conditioner([CAPTION, "other"]), conditioner(["", ""])
    assert a.tokens.shape == (2, 1, 8) and a.mask.all() and a.mask.shape == (2, 1)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.pooled, a.tokens[:, 0])
    a.tokens.sum().backward()
    assert conditioner.token.grad is not None
