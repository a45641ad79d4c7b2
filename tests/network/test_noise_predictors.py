"""What every noise predictor promises: network(x, time, conditioning) -> like x."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from carrara.network.conditioning import Conditioning
from tests.tiny import awake, dit, unet

WIDTH = 8  # of the conditioning

every_network = pytest.mark.parametrize(
    "build", [unet, dit, lambda: dit(text="joint")], ids=["unet", "dit_cross", "dit_joint"]
)
Build = Callable[[], nn.Module]


def inputs(batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 8, 8), torch.rand(batch) * 1000


def conditioning(batch: int = 2, length: int = 5) -> Conditioning:
    mask = torch.ones(batch, length, dtype=torch.bool)
    return Conditioning(torch.randn(batch, length, WIDTH), mask, torch.randn(batch, WIDTH))


@every_network
def test_the_answer_has_the_shape_of_x_and_starts_as_zero(build: Build):
    (x, time), text = inputs(), conditioning()
    assert torch.equal(build()(x, time, text), torch.zeros_like(x))


@every_network
def test_everything_it_is_told_changes_its_answer(build: Build):
    model = awake(build())
    (x, time), text = inputs(), conditioning()
    answer = model(x, time, text)
    variants = [
        (x + 0.1, time, text),
        (x, time + 100, text),
        (x, time, Conditioning(text.tokens + torch.randn(WIDTH), text.mask, text.pooled)),
        (x, time, Conditioning(text.tokens, text.mask, text.pooled + 1)),
    ]
    for variant in variants:
        assert (model(*variant) - answer).abs().max() > 1e-4


@every_network
def test_padding_tokens_change_nothing(build: Build):
    model = awake(build())
    (x, time), text = inputs(), conditioning(length=3)
    answer = model(x, time, text)
    tokens = torch.cat([text.tokens, 100 * torch.randn(2, 4, WIDTH)], dim=1)
    mask = torch.cat([text.mask, torch.zeros(2, 4, dtype=torch.bool)], dim=1)
    padded = model(x, time, Conditioning(tokens, mask, text.pooled))
    torch.testing.assert_close(padded, answer, atol=1e-6, rtol=0)


@every_network
def test_samples_do_not_mix(build: Build):
    model = awake(build())
    (x, time), text = inputs(3), conditioning(3)
    together = model(x, time, text)
    for k in range(3):
        rows = slice(k, k + 1)
        alone = model(x[rows], time[rows], Conditioning(text.tokens[rows], text.mask[rows], text.pooled[rows]))
        torch.testing.assert_close(alone, together[rows], atol=1e-5, rtol=1e-5)
