import pytest
import torch
from torch import Tensor

from carrara.network.attention import Attention, attend, rotary_angles
from carrara.network.cache import Cache
from carrara.network.layers import RMSNorm

N, WIDTH = 7, 16


def causal_reference(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Query by query, of the keys that it may see, in float64; `allowed` (L,) of all of them."""
    n, length = q.shape[-2], k.shape[-2]
    rows = []
    for i in range(n):
        seen = torch.arange(length) <= length - n + i
        seen &= torch.ones(length, dtype=torch.bool) if allowed is None else allowed
        scores = (q[..., i : i + 1, :].double() @ k[..., seen, :].double().transpose(-1, -2)) / q.shape[-1] ** 0.5
        rows.append(scores.softmax(-1) @ v[..., seen, :].double())
    return torch.cat(rows, dim=-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 3, 7])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_causal_queries_are_the_last_and_see_what_came_before(dtype, n, masked, training):
    q, k, v = (torch.randn(2, 3, length, 8, dtype=dtype, requires_grad=training) for length in (n, N, N))
    allowed = torch.tensor([1, 1, 0, 1, 0, 1, 1]).bool() if masked else None
    answer = attend(q, k, v, allowed, causal=True)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    wanted = causal_reference(q, k, v, allowed)
    torch.testing.assert_close(answer.double(), wanted, atol=tolerance, rtol=tolerance)


def attention() -> Attention:
    torch.manual_seed(0)
    return Attention(WIDTH, heads=2, qk_norm=True, norm=RMSNorm)


def test_an_answer_does_not_change_when_the_future_does():
    layer, x = attention(), torch.randn(2, N, WIDTH)
    angles = rotary_angles(torch.arange(N), WIDTH // 2)
    for k in range(N):
        other = x.clone()
        other[:, k:] = torch.randn(2, N - k, WIDTH)
        a, b = (layer(tokens, angles=angles, causal=True) for tokens in (x, other))
        torch.testing.assert_close(a[:, :k], b[:, :k], atol=1e-6, rtol=0)
        assert (a[:, k] - b[:, k]).abs().min() > 0
    assert not torch.allclose(layer(x, angles=angles)[:, 0], layer(x, angles=angles, causal=True)[:, 0])


@pytest.mark.parametrize("pieces", [[1] * N, [4, 1, 1, 1], [3, 4], [N]])
def test_piece_by_piece_is_as_all_at_once(pieces):
    layer, x = attention(), torch.randn(2, N, WIDTH)
    angles = rotary_angles(torch.arange(N), WIDTH // 2)
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[1, 2] = False
    whole = layer(x, mask=mask, angles=angles, causal=True)
    cache, start, answers = Cache(N), 0, []
    for length in pieces:
        part = slice(start, start + length)
        answers.append(layer(x[:, part], mask=mask[:, : part.stop], angles=angles[part], causal=True, cache=cache))
        start += length
        assert cache.length == start
    torch.testing.assert_close(torch.cat(answers, dim=1), whole, atol=1e-5, rtol=0)


def test_a_tokens_keys_and_values_are_made_once():
    layer, x, cache = attention(), torch.randn(1, N, WIDTH), Cache(N)
    made: list[int] = []
    layer.key.register_forward_hook(lambda _, given, out: made.append(given[0].shape[1]))
    for k in range(N):
        layer(x[:, k : k + 1], causal=True, cache=cache)
    assert made == [1] * N


def test_a_contexts_keys_and_values_are_made_once():
    layer, x, context = Attention(WIDTH, 2, context_width=6), torch.randn(2, N, WIDTH), torch.randn(2, 4, 6)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    whole = layer(x, context, mask)
    made: list[int] = []
    layer.value.register_forward_hook(lambda _, given, out: made.append(given[0].shape[1]))
    cache = Cache(4)
    answers = [layer(x[:, k : k + 1], context, mask, cache=cache) for k in range(N)]
    torch.testing.assert_close(torch.cat(answers, dim=1), whole, atol=1e-6, rtol=0)
    assert made == [4]


def test_more_than_there_is_room_for_is_refused():
    cache = Cache(2)
    cache.append(torch.randn(1, 2, 2, 4), torch.randn(1, 2, 2, 4))
    with pytest.raises(ValueError, match="3 tokens do not go into a cache for 2"):
        cache.append(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))
