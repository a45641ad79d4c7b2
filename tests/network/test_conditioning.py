import torch

from carrara.network.conditioning import Conditioning


def conditioning(batch: int, length: int, start: float) -> Conditioning:
    tokens = start + torch.arange(batch * length * 2).float().reshape(batch, length, 2)
    mask = torch.arange(length)[None] < torch.arange(1, batch + 1)[:, None]
    return Conditioning(tokens, mask, start + torch.arange(batch * 3).float().reshape(batch, 3))


def test_batches_of_different_lengths_are_joined():
    short, long = conditioning(2, 3, 1.0), conditioning(1, 5, 100.0)
    for a, b in ((short, long), (long, short)):
        both = a.cat(b)
        n = len(a.tokens)
        assert both.tokens.shape == (3, 5, 2)
        for rows, part in ((slice(0, n), a), (slice(n, None), b)):
            length = part.tokens.shape[1]
            assert torch.equal(both.tokens[rows, :length], part.tokens)
            assert torch.equal(both.mask[rows, :length], part.mask)
            assert not both.mask[rows, length:].any()  # what was added is not attended to
            assert torch.equal(both.pooled[rows], part.pooled)


def test_dropped_samples_take_the_other_conditioning():
    captions, empty = conditioning(3, 5, 1.0), conditioning(3, 2, 100.0)
    drop = torch.tensor([False, False, True])  # whose masks differ in length and in number
    for a, b, taken in ((captions, empty, drop), (empty, captions, drop)):
        mixed = a.where(taken, b)
        for k, dropped in enumerate(taken.tolist()):
            part = b if dropped else a
            length = part.tokens.shape[1]
            assert torch.equal(mixed.tokens[k, :length], part.tokens[k])
            assert torch.equal(mixed.mask[k, :length], part.mask[k]) and not mixed.mask[k, length:].any()
            assert torch.equal(mixed.pooled[k], part.pooled[k])


def test_pictures_go_along():
    """A picture that only one side has is dropped: there is nothing to put beside the other's x."""
    a = conditioning(2, 3, 1.0).with_picture(torch.ones(2, 3, 4, 4), torch.tensor([0.1, 0.2]))
    b = conditioning(2, 2, 9.0).with_picture(torch.zeros(2, 3, 4, 4), torch.tensor([0.3, 0.4]))
    both = a.cat(b)
    assert both.picture is not None and both.picture_noise is not None
    assert both.picture.mean((1, 2, 3)).tolist() == [1, 1, 0, 0]
    assert torch.equal(both.picture_noise, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    mixed = a.where(torch.tensor([False, True]), b)
    assert mixed.picture is not None and mixed.picture.mean((1, 2, 3)).tolist() == [1, 0]
    assert a.cat(conditioning(2, 3, 1.0)).picture is None
