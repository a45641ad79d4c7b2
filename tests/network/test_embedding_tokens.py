import numpy as np
import pytest
import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.network.embedding_tokens import EmbeddingTokens

WIDTH, COMPONENTS, BUCKETS = 12, 5, 64


def embeddings(count: int = 200, seed: int = 0) -> Tensor:
    """Gaussian ones around a mean, of falling variance along directions that are not the axes."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7)))[0]
    return 3 + (torch.randn(count, WIDTH, generator=generator) * 0.6 ** torch.arange(WIDTH)) @ rotation


def measured(num_components: int = COMPONENTS, num_buckets: int = BUCKETS) -> EmbeddingTokens:
    made = EmbeddingTokens(WIDTH, num_components, num_buckets)
    made.measure(embeddings())
    return made


def test_components_are_those_of_numpys_singular_value_decomposition():
    made, x = measured(), embeddings().numpy().astype(np.float64)
    centred = x - x.mean(0)
    _, _, rows = np.linalg.svd(centred)
    found = made.components.numpy()
    np.testing.assert_allclose(np.abs((found * rows[:COMPONENTS]).sum(1)), 1, atol=1e-6)  # up to sign
    np.testing.assert_allclose(made.mean, x.mean(0), atol=1e-6)
    values = centred @ found.T
    np.testing.assert_allclose(made.low, values.min(0), atol=1e-5)
    np.testing.assert_allclose(made.low + BUCKETS * made.bucket_width, values.max(0), atol=1e-5)
    assert (np.diff(values.var(0)) < 0).all()


def test_with_all_components_an_embedding_comes_back_to_half_a_bucket_of_each():
    made, x = measured(WIDTH), embeddings()
    error = (made.dequantise(made.quantise(x)) - x) @ made.components.T
    assert (error.abs() <= 0.5 * made.bucket_width + 1e-5).all()
    # in floating point, uniform within a bucket: the mean square is a twelfth of its width's
    torch.testing.assert_close(error.square().mean(0), made.bucket_width.square() / 12, rtol=0.3, atol=0)


def test_what_is_lost_besides_are_the_components_left_out():
    made, x = measured(COMPONENTS, 4096), embeddings().double().numpy()
    lost = np.linalg.svd(x - x.mean(0), compute_uv=False)[COMPONENTS:]
    error = made.dequantise(made.quantise(embeddings())).double().numpy() - x
    assert np.square(error).sum() == pytest.approx(np.square(lost).sum(), rel=1e-3)


def test_every_bucket_is_a_fixed_point_and_values_beyond_the_range_are_in_the_outermost():
    made = measured()
    tokens = torch.randint(0, BUCKETS, (50, COMPONENTS), generator=torch.Generator().manual_seed(0))
    assert torch.equal(made.quantise(made.dequantise(tokens)), tokens)
    far = made.mean + 1000 * torch.stack([made.components[0], -made.components[0]])
    assert made.quantise(far)[:, 0].tolist() == [BUCKETS - 1, 0]


def test_tokens_are_the_same_under_autocast():
    made, x = measured(num_buckets=1024), embeddings()
    tokens, back = made.quantise(x), made.dequantise(made.quantise(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.quantise(x), tokens) and torch.equal(made.dequantise(tokens), back)


def test_what_was_measured_travels_in_the_state():
    made, empty = measured(), EmbeddingTokens(WIDTH, COMPONENTS, BUCKETS)
    assert [made.measured, empty.measured] == [True, False]
    empty.load_state_dict(made.state_dict())
    assert empty.measured
    assert torch.equal(empty.quantise(embeddings()), made.quantise(embeddings()))


def test_equal_embeddings_are_one_bucket():
    made = EmbeddingTokens(4, 2, 8)
    made.measure(torch.ones(5, 4))
    torch.testing.assert_close(made.dequantise(made.quantise(torch.ones(1, 4))), torch.ones(1, 4))


@pytest.mark.parametrize(
    ("components", "buckets", "says"),
    [
        (0, 8, "network.num_components=0 must be from 1 to 12"),
        (13, 8, "network.num_components=13 must be from 1 to 12"),
        (5, 1, "network.num_buckets=1 must be"),
    ],
)
def test_impossible_settings(components, buckets, says):
    with pytest.raises(ValueError, match=says):
        EmbeddingTokens(WIDTH, components, buckets)


def test_too_few_pictures_are_a_clear_error():
    made = EmbeddingTokens(WIDTH, COMPONENTS, BUCKETS)
    with pytest.raises(UserError, match=r"network\.num_components=5 cannot be found in 5 pictures"):
        made.measure(embeddings(5))
