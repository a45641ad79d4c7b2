import pytest
import torch
from torch import Tensor

from carrara.network.autoregressive import DecoderBlock, TextImageTransformer
from tests.tiny import awake, text_image_transformer

LENGTH, GRID, CODES = 8, (2, 3), 16
CAPTIONS = ["a big red disc", "a small cube"]


@pytest.fixture
def network() -> TextImageTransformer:
    made = text_image_transformer()
    awake(made)
    return made.eval()


def tokens(rows: int = 2) -> Tensor:
    return torch.randint(0, CODES, (rows, GRID[0] * GRID[1]), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(network: TextImageTransformer, ids: Tensor, mask: Tensor, of: Tensor) -> Tensor:
    """Of every token after the first, each with as many as the larger vocabulary (B, N, 300)."""
    text, image = network(ids, mask, of, GRID)
    return torch.cat([text, torch.nn.functional.pad(image, (0, 300 - CODES))], dim=1)


def test_captions_are_read_to_one_length(network):
    ids, mask = network.read([*CAPTIONS, "", " ".join(CAPTIONS)])
    assert ids.shape == mask.shape == (4, LENGTH)
    assert mask.sum(1).tolist() == [6, 5, 2, LENGTH]
    assert ids[:, 0].tolist() == [1] * 4 and ids[mask.cumsum(1).eq(mask.sum(1)[:, None]) & mask].tolist() == [2] * 4


@pytest.mark.parametrize("place", range(1, LENGTH + GRID[0] * GRID[1]))
def test_logits_do_not_change_when_future_tokens_do(network, place):
    """Brute force over all tokens: what tells of a token is what came before, and all of it."""
    ids, mask = network.read([" ".join(CAPTIONS)] * 2)
    whole = logits(network, ids, mask, tokens())
    other_ids, other_tokens = ids.clone(), tokens()
    for k in range(place, LENGTH):
        other_ids[:, k] = 3 + (ids[:, k] + 7) % 100
    for k in range(max(0, place - LENGTH), other_tokens.shape[1]):
        other_tokens[:, k] = (other_tokens[:, k] + 5) % CODES
    changed = logits(network, other_ids, mask, other_tokens)
    torch.testing.assert_close(changed[:, :place], whole[:, :place], atol=1e-6, rtol=0)
    if place < whole.shape[1]:
        assert ((changed[:, place:] - whole[:, place:]).abs().amax(2) > 1e-6).all()


@pytest.mark.parametrize("place", range(LENGTH + GRID[0] * GRID[1] - 1))
def test_every_token_is_heard_by_all_after_it(network, place):
    ids, mask = network.read([" ".join(CAPTIONS)])
    whole, one = logits(network, ids, mask, tokens(1)), tokens(1)
    if place < LENGTH:
        ids[:, place] = 3 + (ids[:, place] + 7) % 100
    else:
        one[:, place - LENGTH] = (one[:, place - LENGTH] + 5) % CODES
    assert ((logits(network, ids, mask, one) - whole)[:, place:].abs().amax(2) > 1e-7).all()


def test_the_first_token_of_the_picture_is_told_by_the_caption_alone(network):
    ids, mask = network.read(CAPTIONS)
    _, image = network(ids, mask, tokens(), GRID)
    assert not torch.allclose(image[0, 0], image[1, 0])
    _, other = network(ids, mask, (tokens() + 1) % CODES, GRID)
    torch.testing.assert_close(image[:, 0], other[:, 0])


def test_padding_is_a_learned_vector_of_its_position(network):
    ids, mask = network.read(CAPTIONS)  # of 6 and of 5 tokens
    whole = logits(network, ids, mask, tokens())
    assert torch.equal(logits(network, ids.masked_fill(~mask, 77), mask, tokens()), whole)
    network(ids, mask, tokens(), GRID)[1].sum().backward()
    assert network.padding.grad.abs().sum(1).gt(0).tolist() == [False] * 5 + [True] * 3


def test_places_are_told_apart(network):
    """The same token everywhere, but not the same answer, not even at places as far from those before them."""
    ids, mask = network.read([""])
    _, image = network(ids, mask, torch.full((1, 6), 3), GRID)
    apart = torch.cdist(image[0], image[0]) + torch.eye(6)
    assert apart.min() > 1e-3


def test_rows_and_columns_are_not_interchanged(network):
    ids, mask = network.read(CAPTIONS)
    flat, tall = (network(ids, mask, tokens(), grid)[1] for grid in (GRID, GRID[::-1]))
    torch.testing.assert_close(flat[:, 0], tall[:, 0])
    assert not torch.allclose(flat[:, 3], tall[:, 3], atol=1e-4)


@pytest.mark.parametrize("copies", [1, 2])
@torch.no_grad()
def test_sampling_with_kept_keys_is_as_without(network, copies):
    """The same tokens, and logits to 1e-5, as the whole sequence anew for every token."""
    ids, mask = network.read([*CAPTIONS, *([""] * (2 * copies - 2))])
    seen: list[Tensor] = []

    def choice(of: Tensor, place: int) -> Tensor:
        return (of.argmax(1) + place + torch.tensor([0, 5])) % CODES  # so that rows and places have tokens of their own

    def choose(of: Tensor, place: int) -> Tensor:
        assert place == len(seen) and of.dtype == torch.float32
        seen.append(of)
        return choice(of[:2], place)

    sampled = network.sample(ids, mask, GRID, choose)
    known = torch.zeros(2, 6, dtype=torch.int64)
    for place in range(6):
        _, image = network(ids, mask, known.repeat(copies, 1), GRID)
        torch.testing.assert_close(seen[place], image[:, place], atol=1e-5, rtol=0)
        known[:, place] = choice(image[:2, place], place)
    assert torch.equal(sampled, known)


def test_checkpointing_recomputes_and_gives_the_same_gradients():
    calls, gradients = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        made = text_image_transformer(checkpointing=checkpointing).train()
        awake(made)
        counted: list[int] = []
        for block in made.blocks:
            assert isinstance(block, DecoderBlock)
            block.norm1.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        ids, mask = made.read(CAPTIONS)
        sum(one.square().sum() for one in made(ids, mask, tokens(), GRID)).backward()
        calls.append(len(counted))
        gradients.append([p.grad for p in made.parameters() if p.grad is not None])
    assert calls[1] == 2 * calls[0]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_each_token_goes_through_the_network_once(network):
    passed: list[int] = []
    network.blocks[1].register_forward_hook(lambda _, given, out: passed.append(given[0].shape[1]))
    network.sample(*network.read(CAPTIONS), GRID, lambda of, place: of.argmax(1))
    assert passed == [LENGTH, *[1] * 5]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 18}, "a width of 18 is not 2 heads"),
        ({"heads": 8}, "a width of 16 is not 8 heads of 4"),
        ({"heads": 0}, "a width of 16 is not 0 heads"),
        ({"heads": -2}, "a width of 16 is not -2 heads"),
        ({"num_codes": 0}, "network.num_codes=0: take a discrete auto-encoder"),
    ],
)
def test_impossible_settings(changes, says):
    with pytest.raises(ValueError, match=says):
        text_image_transformer(**changes)
