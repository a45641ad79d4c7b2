import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from carrara.network.attention import Attention, attend, axial_angles, rotary_angles, rotate
from carrara.network.layers import RMSNorm


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention in float64, written out."""
    scores = torch.einsum("bhnd,bhld->bhnl", q.double(), k.double()) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v.double()


def tensors(n: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(2, 3, n, 16), torch.randn(2, 3, length, 16), torch.randn(2, 3, length, 16)
    return q.to(dtype).requires_grad_(), k.to(dtype).requires_grad_(), v.to(dtype).requires_grad_()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "n"), [(torch.float32, 16), (torch.bfloat16, 16), (torch.bfloat16, 200)])
def test_attention_is_softmax_of_scaled_products(dtype, n, masked):
    q, k, v = tensors(n, 7, dtype)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]]).bool()[:, None, None] if masked else None
    wanted = reference(q, k, v, mask)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(attend(q, k, v, mask).double(), wanted, atol=tolerance, rtol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, mask).double(), wanted, atol=tolerance, rtol=tolerance)


def test_the_path_of_short_sequences_has_the_gradients_of_the_fused_one(monkeypatch):
    q, k, v = tensors(16, 7, torch.bfloat16)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]]).bool()[:, None, None]
    weight = torch.randn(2, 3, 16, 16)
    fused = torch.autograd.grad((F.scaled_dot_product_attention(q, k, v, mask) * weight).sum(), [q, k, v])
    monkeypatch.delattr(F, "scaled_dot_product_attention")  # so that the other path is the one taken
    explicit = torch.autograd.grad((attend(q, k, v, mask) * weight).sum(), [q, k, v])
    for a, b in zip(explicit, fused, strict=True):
        torch.testing.assert_close(a, b, atol=0.06, rtol=0.06)


def test_the_heads_of_attention_look_at_their_own_features():
    attention = Attention(8, heads=2, context_width=6)
    x, context = torch.randn(1, 5, 8), torch.randn(1, 3, 6)
    wanted = attention(x, context)
    with torch.no_grad():
        attention.query.weight[4:] = 0  # the second head attends evenly
    changed = attention(x, context)
    assert not torch.allclose(changed, wanted)
    with torch.no_grad():
        attention.out.weight[:, 4:] = 0  # and is not heard: the first head is as it was
    q, k, v = attention.query(x)[..., :4], attention.key(context)[..., :4], attention.value(context)[..., :4]
    first = (q @ k.transpose(1, 2) / 2).softmax(-1) @ v
    expected = first @ attention.out.weight[:, :4].T + attention.out.bias
    torch.testing.assert_close(attention(x, context), expected)


@pytest.mark.parametrize("norm", [{}, {"norm": RMSNorm}])
def test_normalised_queries_and_keys_bound_the_logits(norm):
    """However large the activations: each head's query and key have length √d, so a logit is at most √d."""
    attention = Attention(16, heads=2, qk_norm=True, **norm)
    x = torch.randn(1, 6, 16)
    with torch.no_grad():
        wanted = attention(x)
        attention.query.weight.mul_(1000)
        attention.key.weight.mul_(1000)
        torch.testing.assert_close(attention(x), wanted, atol=1e-3, rtol=1e-3)
    bare = Attention(16, heads=2)
    with torch.no_grad():
        wanted = bare(x)
        bare.query.weight.mul_(1000)
        assert (bare(x) - wanted).abs().max() > 0.01


def test_rotary_positions_are_seen_only_as_distances():
    """Su et al. 2021, eq. 11: the product of a query at m and a key at n depends on m - n; lengths stay."""
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    angles = rotary_angles(torch.arange(40, dtype=torch.float64), 8)
    turned_q, turned_k = rotate(q.expand(40, 8), angles), rotate(k.expand(40, 8), angles)
    products = turned_q @ turned_k.T
    for distance in range(-5, 6):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert products.diagonal(1)[0] != pytest.approx(float(products.diagonal(2)[0]), abs=1e-3)
    torch.testing.assert_close(turned_q.norm(dim=1), q.norm().expand(40))
    pairs = torch.view_as_complex(torch.stack([q[:4], q[4:]], 1))  # each pair is a complex number that turns
    turn = torch.exp(1j * 7 * 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4))
    torch.testing.assert_close(turned_q[7], torch.cat([(pairs * turn).real, (pairs * turn).imag]))


def test_rotary_positions_of_a_picture_are_seen_only_as_offsets():
    """A query and a key moved by as many rows and columns have the same product; rows and columns are told apart."""
    height, width = 6, 7
    q, k = torch.randn(2, 16)
    angles = axial_angles(height, width, 16)
    assert angles.shape == (height * width, 8)
    turned_q, turned_k = (rotate(x.expand(height * width, 16), angles) for x in (q, k))
    products = (turned_q @ turned_k.T).unflatten(0, (height, width)).unflatten(2, (height, width))
    by_offset: dict[tuple[int, int], list[Tensor]] = {}
    for i, j, m, n in itertools.product(range(height), range(width), range(height), range(width)):
        by_offset.setdefault((m - i, n - j), []).append(products[i, j, m, n])
    for same in by_offset.values():
        torch.testing.assert_close(torch.stack(same), same[0].expand(len(same)), atol=1e-5, rtol=1e-5)
    distinct = torch.stack([same[0] for same in by_offset.values()])
    assert (distinct[:, None] - distinct).abs().fill_diagonal_(1).min() > 1e-5  # (2, 1) is not (1, 2) nor (1, -2)
    assert abs(by_offset[0, 3][0] - by_offset[3, 0][0]) > 1e-2


def test_rotary_positions_of_a_picture_need_two_pairs_of_features():
    with pytest.raises(ValueError, match="a head has 6"):
        axial_angles(2, 2, 6)


def test_rotary_positions_need_pairs_of_features():
    with pytest.raises(ValueError, match="a head has 7"):
        rotary_angles(torch.arange(3), 7)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="a width of 8 is not 3 heads of 1, 2, 3 … features"):
        Attention(8, heads=3)
