"""What every discrete auto-encoder promises."""

import math

import pytest
import torch

from carrara.autoencoder.discrete import Discrete, gumbel
from tests import tiny

KINDS = {"vq": tiny.vq, "gumbel": tiny.gumbel}


@pytest.fixture(params=KINDS)
def autoencoder(request) -> Discrete:
    torch.manual_seed(0)
    made = KINDS[request.param]().eval()
    torch.nn.init.normal_(made.get_parameter("quant_conv.weight"), std=5.0)  # latents far enough apart to differ
    return made


def pictures(count: int = 3, height: int = 8, width: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, height, width) * 2 - 1


@torch.no_grad()
def test_pictures_become_tokens_and_come_back_as_the_quantised_latents_do(autoencoder):
    images = pictures()
    tokens = autoencoder.tokens(images)
    assert tokens.shape == (3, 2 * 4) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < autoencoder.num_codes == len(autoencoder.codes)
    assert len(tokens.unique()) > 2
    back = autoencoder.decode_tokens(tokens, 8, 16)
    assert back.shape == images.shape
    torch.testing.assert_close(back, autoencoder.decode(autoencoder.encode(images)))
    torch.testing.assert_close(back, autoencoder.decode_raw(autoencoder.posterior(images)[0]))


@torch.no_grad()
def test_tokens_are_row_by_row(autoencoder):
    tokens = torch.arange(8)[None]
    z = autoencoder.latents_of(tokens, 2, 4)
    assert z.shape == (1, autoencoder.latent_channels, 2, 4)
    for row in range(2):
        for column in range(4):
            assert torch.equal(z[0, :, row, column], autoencoder.codes[4 * row + column])


@torch.no_grad()
def test_latents_near_the_encoders_decode_alike(autoencoder):
    """Quantisation takes small errors back: what diffusion in the latents leaves over."""
    z = autoencoder.encode(pictures())
    assert torch.equal(autoencoder.decode(z + 1e-6), autoencoder.decode(z))
    assert not torch.equal(autoencoder.decode(torch.randn_like(z) * 3), autoencoder.decode(z))


@torch.no_grad()
def test_the_posterior_has_no_width(autoencoder):
    images = pictures()
    z = autoencoder.encode(images)
    assert torch.equal(autoencoder.encode(images, torch.randn_like(z)), z)


def test_one_code_is_refused():
    for kind in KINDS.values():
        with pytest.raises(ValueError, match=r"autoencoder\.num_codes=1"):
            kind(num_codes=1)


@torch.no_grad()
def test_tokens_do_not_depend_on_the_batch_or_on_autocast_alone(autoencoder):
    images = pictures(4)
    tokens = autoencoder.tokens(images)
    assert torch.equal(torch.cat([autoencoder.tokens(one[None]) for one in images]), tokens)
    z = autoencoder.posterior(images)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(autoencoder.assign(z).flatten(1), tokens)


def test_gumbel_numbers_are_of_the_gumbel_distribution():
    normal = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    cdf = torch.exp(-torch.exp(-gumbel(normal)))
    torch.testing.assert_close(cdf, torch.erfc(-normal / math.sqrt(2)) / 2, rtol=1e-9, atol=0)
    assert gumbel(torch.tensor([-8.5, 8.5])).isfinite().all()  # the ends of keyed float32 noise
    draws = gumbel(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    assert draws.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert draws.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03)
