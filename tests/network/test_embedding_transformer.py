import pytest
import torch
from torch import Tensor

from carrara.network.conditioning import Conditioning
from carrara.network.embedding_transformer import EmbeddingTransformer
from tests.tiny import awake

COMPONENTS, BUCKETS, LENGTH = 5, 9, 3


def made(**changes: int) -> EmbeddingTransformer:
    settings = {"num_components": COMPONENTS, "num_buckets": BUCKETS, "width": 16, "depth": 2, "heads": 2}
    return EmbeddingTransformer(embedding_width=6, context_width=8, expansion=2.667, **settings | changes)


@pytest.fixture
def network() -> EmbeddingTransformer:
    torch.manual_seed(0)
    network = made()
    awake(network)
    return network.eval()


def conditioning(batch: int = 2) -> Conditioning:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(batch, LENGTH, 8, generator=generator)
    return Conditioning(tokens, torch.ones(batch, LENGTH, dtype=torch.bool), torch.randn(batch, 6, generator=generator))


def padded(told: Conditioning, by: int, real: list[int]) -> Conditioning:
    """With `by` more places and only so many `real` tokens in each row; what is in the others is noise."""
    tokens = torch.cat([told.tokens, torch.randn(len(told.tokens), by, 8)], dim=1)
    mask = torch.arange(LENGTH + by) < torch.tensor(real)[:, None]
    return Conditioning(torch.where(mask[..., None], tokens, torch.randn_like(tokens)), mask, told.pooled)


def tokens(batch: int = 2) -> Tensor:
    return torch.randint(0, BUCKETS, (batch, COMPONENTS), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("place", range(COMPONENTS))
def test_a_token_is_heard_by_all_after_it_and_by_none_before(network, place):
    whole, changed = network(tokens(), conditioning()), tokens()
    changed[:, place] = (changed[:, place] + 4) % BUCKETS
    difference = (network(changed, conditioning()) - whole).abs().amax(2)
    assert difference[:, : place + 1].max() < 1e-6
    assert (difference[:, place + 1 :] > 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("what", ["pooled", 0, 1, 2])
def test_everything_it_is_told_changes_every_answer(network, what):
    told = conditioning()
    whole = network(tokens(), told)
    if what == "pooled":
        told = Conditioning(told.tokens, told.mask, told.pooled + 1)
    else:
        told.tokens[:, what] += 1
    assert ((network(tokens(), told) - whole).abs().amax(2) > 1e-6).all()


@torch.no_grad()
def test_words_are_heard_in_their_order(network):
    told = conditioning()
    other = Conditioning(told.tokens.flip(1), told.mask, told.pooled)
    assert not torch.allclose(network(tokens(), told), network(tokens(), other), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("by", [0, 4])
def test_padding_is_not_seen_however_long_it_is(network, by):
    told = conditioning()
    short = Conditioning(told.tokens[:, :2], told.mask[:, :2], told.pooled)
    expected = network(tokens(), short)[0], network(tokens(), told)[1]
    found = network(tokens(), padded(told, by, [2, 3]))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_no_caption_at_all_is_answered(network):
    assert network(tokens(), padded(conditioning(), 0, [0, 0])).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("copies", [1, 2])
def test_sampling_with_kept_keys_is_as_without(network, copies):
    """The same tokens, and logits to 1e-5, as the whole sequence anew for every token."""
    told = padded(conditioning(2 * copies), 1, [2, 4, 3, 1][: 2 * copies])
    seen: list[Tensor] = []

    def choice(of: Tensor, place: int) -> Tensor:
        return (of.argmax(1) + place + torch.tensor([0, 5])) % BUCKETS  # rows and places have tokens of their own

    def choose(of: Tensor, place: int) -> Tensor:
        assert place == len(seen) and of.dtype == torch.float32
        seen.append(of)
        return choice(of[:2], place)

    sampled = network.sample(told, choose)
    known = torch.zeros(2, COMPONENTS, dtype=torch.int64)
    for place in range(COMPONENTS):
        logits = network(known.repeat(copies, 1), told)[:, place]
        torch.testing.assert_close(seen[place], logits, atol=1e-5, rtol=0)
        known[:, place] = choice(logits[:2], place)
    assert torch.equal(sampled, known)


@torch.no_grad()
def test_each_token_goes_through_the_network_once(network):
    passed: list[int] = []
    network.blocks[1].register_forward_hook(lambda _, given, out: passed.append(given[0].shape[1]))
    network.sample(conditioning(), lambda of, place: of.argmax(1))
    assert passed == [1 + LENGTH + 1, *[1] * (COMPONENTS - 1)]


@torch.no_grad()
def test_components_are_told_apart(network):
    """The same bucket everywhere, and not the same answer."""
    logits = network(torch.full((1, COMPONENTS), 3), conditioning(1))[0]
    assert (torch.cdist(logits, logits) + torch.eye(COMPONENTS)).min() > 1e-3


def test_every_parameter_learns(network):
    network(tokens(), conditioning()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize("changes", [{"width": 15}, {"heads": 16}])
def test_impossible_settings(changes):
    with pytest.raises(ValueError, match=r"a width of \d+ is not \d+ heads of 2, 4, 6 … features"):
        made(**changes)
