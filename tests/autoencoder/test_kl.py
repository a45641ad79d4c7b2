import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from carrara.autoencoder.kl import KL
from carrara.divergence import kl_to_standard_normal
from tests.tiny import kl

DEMO = Path(__file__).parents[2] / "conf" / "size" / "demo.yaml"


@pytest.mark.parametrize(
    ("channels", "patch", "downsampling"),
    [([8, 16], 2, 4), ([8, 8, 16], 1, 4), ([8, 8, 8, 16], 1, 8), ([8, 16], 4, 8), ([8], 4, 4)],
)
def test_images_become_latents_and_come_back(channels, patch, downsampling):
    autoencoder = kl(channels=channels, patch=patch, downsampling=downsampling)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    z = autoencoder.encode(images)
    assert z.shape == (2, *autoencoder.latent_shape(32, 32)) == (2, 4, 32 // downsampling, 32 // downsampling)
    assert autoencoder.decode(z).shape == images.shape


def test_the_demo_stores_a_twelfth_of_the_pixels_values():
    size = yaml.safe_load(DEMO.read_text())
    node = {key: size["autoencoder"][key] for key in ("downsampling", "channels", "num_blocks", "patch", "kl_weight")}
    with torch.device("meta"):
        autoencoder = KL(latent_channels=4, **node)
        images = torch.empty(1, 3, size["resolution"], size["resolution"])
        z = autoencoder.encode(images)
    assert z.shape[1:] == (4, 8, 8)
    assert 12 * z.numel() == images.numel()


def test_levels_that_do_not_make_the_downsampling_are_refused():
    with pytest.raises(ValueError, match=r"downsampling=8.*2 levels on patches of 2 give 4"):
        kl(downsampling=8)


def test_statistics_normalise_and_are_undone():
    autoencoder = kl()
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    mean, logvar = autoencoder.posterior(images)
    plain = autoencoder.decode(mean)
    shift, scale = torch.tensor([1.0, -2.0, 0.0, 0.5]), torch.tensor([2.0, 0.5, 1.0, 3.0])
    autoencoder.set_statistics(shift, scale)
    z = autoencoder.encode(images)
    torch.testing.assert_close(z, (mean - shift[:, None, None]) / scale[:, None, None])
    torch.testing.assert_close(autoencoder.decode(z), plain, atol=1e-5, rtol=1e-5)
    noise = torch.randn_like(mean)
    wanted = (mean + (logvar / 2).exp() * noise - shift[:, None, None]) / scale[:, None, None]
    torch.testing.assert_close(autoencoder.encode(images, noise), wanted)


def test_statistics_travel_with_the_weights():
    autoencoder, other = kl(), kl()
    autoencoder.set_statistics(torch.full((4,), 3.0), torch.full((4,), 0.5))
    other.load_state_dict(autoencoder.state_dict())
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(other.encode(images), autoencoder.encode(images))
    assert torch.equal(other.latent_std, torch.full((4,), 0.5))


def test_a_wild_log_variance_stays_finite():
    autoencoder = kl()
    nn.init.constant_(autoencoder.quant_conv.bias, 1e4)  # type: ignore[arg-type]
    _, logvar = autoencoder.posterior(torch.rand(1, 3, 8, 8))
    assert logvar.exp().isfinite().all()


def test_closed_form_kl_is_the_monte_carlo_kl():
    mean, logvar = torch.randn(3, 2, 2, 1, dtype=torch.float64), torch.randn(3, 2, 2, 1, dtype=torch.float64)
    std = (logvar / 2).exp()
    z = mean + std * torch.randn(200_000, *mean.shape, dtype=torch.float64)
    q, p = torch.distributions.Normal(mean, std), torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    monte_carlo = (q.log_prob(z) - p.log_prob(z)).sum((2, 3, 4)).mean(0)
    torch.testing.assert_close(kl_to_standard_normal(mean, logvar), monte_carlo, rtol=0.01, atol=0)


def test_kl_is_zero_only_at_the_prior():
    zero = torch.zeros(1, 2, 2, 2)
    assert kl_to_standard_normal(zero, zero).item() == 0
    for other in (zero + 0.3, zero - 0.3):
        assert kl_to_standard_normal(other, zero).item() > 0.1 and kl_to_standard_normal(zero, other).item() > 0.1


class LinearVAE(nn.Module):
    """z ~ N(0, 1), x | z ~ N(W z + b, s²), q(z | x) = N(A (x − b), diag(v)): the bound in closed form."""

    def __init__(self, width: int, latents: int):
        super().__init__()
        self.W = nn.Parameter(torch.randn(width, latents))
        self.b = nn.Parameter(torch.zeros(width))
        self.log_s = nn.Parameter(torch.zeros(()))
        self.A = nn.Parameter(0.1 * torch.randn(latents, width))
        self.logvar = nn.Parameter(torch.zeros(latents))

    def bound(self, x: Tensor) -> Tensor:
        mean = (x - self.b) @ self.A.T
        variance, v = (2 * self.log_s).exp(), self.logvar.exp()
        error = (x - self.b - mean @ self.W.T).square().sum(1) + (self.W**2 @ v).sum()
        likelihood = -error / (2 * variance) - x.shape[1] * (self.log_s + 0.5 * math.log(2 * math.pi))
        logvar = self.logvar.expand_as(mean)
        return likelihood - kl_to_standard_normal(mean[..., None, None], logvar[..., None, None])

    def exact(self, x: Tensor) -> Tensor:
        covariance = self.W @ self.W.T + (2 * self.log_s).exp() * torch.eye(len(self.b))
        return MultivariateNormal(self.b, covariance).log_prob(x)


def test_the_bound_of_a_linear_vae_is_tight_once_trained():
    torch.set_default_dtype(torch.float64)
    try:
        data = torch.randn(500, 2) @ torch.randn(2, 5) + 0.3 * torch.randn(500, 5) + 1.0
        vae = LinearVAE(5, 2)
        gap = vae.exact(data) - vae.bound(data)
        assert gap.min() > 0 and gap.mean() > 0.1  # a bound for every sample, and not yet tight
        optimizer = torch.optim.LBFGS(vae.parameters(), max_iter=400, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = -vae.bound(data).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        gap = (vae.exact(data) - vae.bound(data)).detach()
    finally:
        torch.set_default_dtype(torch.float32)
    assert gap.min() > -1e-9 and gap.mean() < 0.01
