import pytest
import torch

from carrara.network.conditioning import Conditioning
from carrara.network.prior_transformer import PriorTransformer


@pytest.fixture
def network() -> PriorTransformer:
    torch.manual_seed(0)
    return PriorTransformer(embedding_width=6, context_width=8, width=16, depth=2, heads=2)


def conditioning(batch: int = 2, length: int = 3) -> Conditioning:
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(batch, length, dtype=torch.bool)
    tokens = torch.randn(batch, length, 8, generator=generator)
    return Conditioning(tokens, mask, torch.randn(batch, 6, generator=generator))


@pytest.mark.parametrize("what", ["x", "time", "tokens", "pooled"])
def test_everything_it_is_told_changes_the_answer(network, what):
    x, time, told = torch.randn(2, 6), torch.tensor([10.0, 900.0]), conditioning()
    first = network(x, time, told)
    assert first.shape == (2, 6)
    x, time = x + (what == "x"), time + 50 * (what == "time")
    told = Conditioning(told.tokens + (what == "tokens"), told.mask, told.pooled + (what == "pooled"))
    assert not torch.allclose(network(x, time, told), first, atol=1e-4)


def test_padding_is_not_seen(network):
    x, time, told = torch.randn(2, 6), torch.tensor([10.0, 900.0]), conditioning()
    longer = torch.cat([told.tokens, torch.randn(2, 4, 8)], dim=1)
    mask = torch.nn.functional.pad(told.mask, (0, 4))
    torch.testing.assert_close(network(x, time, Conditioning(longer, mask, told.pooled)), network(x, time, told))
