"""Generator, discriminator and the variational pair: what they are told, and that samples do not mix."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from carrara.network.conditioning import Conditioning
from carrara.network.discriminator import Discriminator
from carrara.network.generator import Generator
from carrara.network.pyramid import Bottleneck
from carrara.network.variational import Variational
from tests.tiny import awake, pyramid

WIDTH, NOISE = 8, 4


def conditioning(batch: int = 2, length: int = 5) -> Conditioning:
    mask = torch.ones(batch, length, dtype=torch.bool)
    return Conditioning(torch.randn(batch, length, WIDTH), mask, torch.randn(batch, WIDTH))


def generator(**changes) -> nn.Module:
    return Generator(pyramid(**changes), NOISE, WIDTH)


def discriminator() -> nn.Module:
    return Discriminator(pyramid(), WIDTH)


def variational() -> nn.Module:
    return Variational(pyramid(), NOISE, WIDTH)


def noise(batch: int) -> Tensor:
    return torch.randn(batch, NOISE)


def pictures(batch: int) -> Tensor:
    return torch.rand(batch, 3, 8, 8) * 2 - 1


every_network = pytest.mark.parametrize(
    ("build", "draw", "shape"),
    [(generator, noise, (3, 8, 8)), (variational, noise, (3, 8, 8)), (discriminator, pictures, ())],
    ids=["generator", "variational", "discriminator"],
)
Build = Callable[[], nn.Module]
Draw = Callable[[int], Tensor]


@every_network
def test_the_answers_shape(build: Build, draw: Draw, shape: tuple[int, ...]):
    assert build()(draw(3), conditioning(3)).shape == (3, *shape)


@every_network
def test_everything_it_is_told_changes_its_answer(build: Build, draw: Draw, shape: tuple[int, ...]):
    model, x, text = awake(build()), draw(2), conditioning()
    answer = model(x, text)
    variants = [
        (x + 0.1, text),
        (x, Conditioning(text.tokens + torch.randn(WIDTH), text.mask, text.pooled)),
        (x, Conditioning(text.tokens, text.mask, text.pooled + 1)),
    ]
    for variant in variants:
        assert (model(*variant) - answer).abs().max() > 1e-4


@every_network
def test_padding_tokens_change_nothing(build: Build, draw: Draw, shape: tuple[int, ...]):
    model, x, text = awake(build()), draw(2), conditioning(length=3)
    tokens = torch.cat([text.tokens, 100 * torch.randn(2, 4, WIDTH)], dim=1)
    mask = torch.cat([text.mask, torch.zeros(2, 4, dtype=torch.bool)], dim=1)
    padded = model(x, Conditioning(tokens, mask, text.pooled))
    torch.testing.assert_close(padded, model(x, text), atol=1e-5, rtol=0)


@every_network
def test_samples_do_not_mix(build: Build, draw: Draw, shape: tuple[int, ...]):
    """And so the gradient of a sum of logits has each sample's own gradient in its rows."""
    model, x, text = awake(build()), draw(3), conditioning(3)
    together = model(x, text)
    for k in range(3):
        rows = slice(k, k + 1)
        alone = model(x[rows], text.take(torch.arange(k, k + 1)))
        torch.testing.assert_close(alone, together[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("resolution", "patch", "channels", "grid"), [(8, 2, [8, 16], 2), (16, 1, [8, 8, 16], 4), (12, 4, [8], 3)]
)
def test_levels_halve_the_resolution_down_to_the_grid(resolution, patch, channels, grid):
    shape = pyramid(resolution=resolution, patch=patch, channels=channels, attention=[True] * len(channels))
    assert shape.grid == grid and shape.features == channels[-1] * grid**2
    made = Generator(shape, NOISE, WIDTH)(noise(2), conditioning())
    assert made.shape == (2, 3, resolution, resolution)
    assert Discriminator(shape, WIDTH)(made, conditioning()).shape == (2,)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention": [True]}, r"2 levels, network.pyramid.attention 1"),
        ({"resolution": 10}, r"2 levels .* patches of 2 do not divide a resolution of 10"),
        ({"group_width": 12}, r"group_width=12 does not divide 2 · 8"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        pyramid(**changes)


def test_a_block_starts_as_the_identity_and_its_groups_do_not_mix():
    block, x = Bottleneck(8, group_width=4), torch.randn(1, 8, 4, 4)
    assert torch.equal(block(x), x)
    hidden = torch.randn(1, 16, 4, 4, requires_grad=True)
    block.mix(hidden)[:, :4].sum().backward()
    assert hidden.grad is not None and hidden.grad[:, :4].any() and not hidden.grad[:, 4:].any()


def test_the_prior_starts_as_a_standard_normal_and_hears_the_caption():
    pair = variational()
    assert isinstance(pair, Variational)
    mean, logvar = pair.prior(conditioning())
    assert not mean.any() and not logvar.any()
    awake(pair)
    text = conditioning()
    mean, logvar = pair.prior(text)
    assert not torch.allclose(mean[0], mean[1]) and not torch.allclose(logvar[0], logvar[1])
    n = noise(2)
    torch.testing.assert_close(pair(n, text), pair.generator(mean + (logvar / 2).exp() * n, text))


def test_the_posterior_hears_picture_and_caption():
    pair = awake(variational())
    assert isinstance(pair, Variational)
    x, text = pictures(2), conditioning()
    mean, logvar = pair.posterior(x, text)
    assert mean.shape == logvar.shape == (2, NOISE)
    for other in (pair.posterior(x.flip(0), text), pair.posterior(x, conditioning())):
        assert not torch.allclose(other[0], mean) and not torch.allclose(other[1], logvar)
