import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from carrara.model.flow import LEVEL, FlowModel, log_likelihood
from carrara.network.conditioning import Conditioning
from tests.tiny import batch, flow_model, kl, shift_and_scale, tarflow


class Captions(nn.Module):
    """A conditioner that remembers captions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def forward(self, captions: list[str]) -> Conditioning:
        self.seen += captions
        ones = torch.ones(len(captions), 1, 8)
        return Conditioning(ones, ones[..., 0].bool(), ones[:, 0])


def noisy(model: FlowModel, one: dict[str, Any]) -> Tensor:
    return model.noisy(model.images(one), one)


def test_the_identity_has_the_likelihood_of_standard_normal_pictures():
    """To whose mean square the noise adds its own."""
    model, one = flow_model(noise_std=0.5), batch(range(64))
    mean_square = float(model.images(one).square().mean()) + 0.5**2
    wanted = 0.5 * (mean_square + math.log(2 * math.pi))
    assert model.loss(one)["loss"].item() == pytest.approx(wanted, abs=0.01)


def test_the_log_determinant_counts():
    """All pixels halved: log p(x) = log N(x / 2) + dimensions · log ½."""
    network = tarflow(num_blocks=1)
    with torch.no_grad():
        shift_and_scale(network)[12:] = math.log(2)
    model, one = flow_model(network=network, noise_std=0.05), batch(range(8))
    normal = torch.distributions.Normal(0.0, 2.0)
    wanted = -normal.log_prob(noisy(model, one)).mean()
    torch.testing.assert_close(model.loss(one)["loss"], wanted)
    x = noisy(model, one)
    summed = normal.log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(log_likelihood(x / 2, torch.full((8,), -192 * math.log(2))), summed)


def test_bits_per_dimension_bound_those_of_the_levels():
    """Which are known of a standard normal density: the share of its mass that each of 256 levels takes."""
    model, one = flow_model(noise_std=None), batch(range(64))
    found = model.loss(one, torch.rand(64))
    levels = one["images"].double().numpy() / 127.5 - 1
    shares = stats.norm.cdf(levels + LEVEL / 2) - stats.norm.cdf(levels - LEVEL / 2)
    true_bits = -torch.from_numpy(shares).log2().mean()
    assert true_bits == pytest.approx(8.32, abs=0.3)
    assert float(found["bits_per_dim"]) == pytest.approx(float(true_bits), abs=1e-4)
    assert found.keys() == set(model.loss_names) == {"loss", "bits_per_dim"}
    assert flow_model().loss(one).keys() == set(flow_model().loss_names) == {"loss"}


def test_uniform_noise_stays_within_a_level():
    model, one = flow_model(noise_std=None), batch(range(16))
    difference = (noisy(model, one) - model.images(one)) / LEVEL
    assert difference.abs().max() < 0.5 + 1e-4
    assert float(difference.std()) == pytest.approx(12**-0.5, abs=0.01)


@pytest.mark.parametrize("noise_std", [0.05, 0.2])
def test_gaussian_noise_is_as_large_as_asked(noise_std):
    model, one = flow_model(noise_std=noise_std), batch(range(16))
    difference = noisy(model, one) - model.images(one)
    assert float(difference.std()) == pytest.approx(noise_std, rel=0.05)
    assert stats.kstest((difference.flatten() / noise_std).numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("noise_std", [0.05, None])
def test_noise_depends_on_the_position_alone(noise_std):
    model = flow_model(noise_std=noise_std)
    together, apart = noisy(model, batch([3, 4, 5])), noisy(model, batch([5, 9]))
    assert torch.equal(together[2], apart[0])
    later = {**batch([3, 4, 5]), "positions": torch.tensor([103, 104, 105])}
    assert not torch.isclose(noisy(model, later), together, atol=1e-6).all(dim=1).any(dim=0).all()


def test_captions_are_dropped_as_often_as_asked_and_never_in_validation():
    captions = Captions()
    model = flow_model(conditioner=captions, caption_dropout=0.25)
    for k in range(4):
        model.loss(batch(range(500 * k, 500 * (k + 1))))
    assert captions.seen.count("") / 2000 == pytest.approx(0.25, abs=0.04)
    captions.seen.clear()
    flow_model(conditioner=captions, caption_dropout=1.0).loss(batch(range(8)), torch.rand(8))
    assert captions.seen == batch(range(8))["captions"]


def test_cached_captions_are_taken_and_dropped():
    captions = Captions()
    model, one = flow_model(conditioner=captions), batch([0, 1])
    encoded = {"tokens": torch.randn(2, 3, 8), "mask": torch.ones(2, 3).bool(), "pooled": torch.randn(2, 8)}
    found = model.generator.conditioning(one | encoded, torch.tensor([False, True]))
    assert captions.seen == ["", ""]
    assert torch.equal(found.tokens[0], encoded["tokens"][0]) and torch.equal(found.pooled[1], torch.ones(8))


def test_the_caption_mean_adds_its_gradient_in_training_and_nothing_else():
    torch.manual_seed(0)
    model, one = flow_model(caption_mean_weight=0.5), batch(range(4))
    losses = model.loss(one)
    assert losses.keys() == {"loss", "caption_mean"}
    assert model.loss(one, torch.rand(4)).keys() == set(model.loss_names)
    assert model.caption_mean is not None
    drop = model.uniform(one, "caption_dropout") < 0.1
    wanted = model.caption_mean.squared_error(model.generator.conditioning(one, drop), model.images(one)).mean()
    torch.testing.assert_close(losses["caption_mean"], wanted)
    model.caption_mean = None
    torch.testing.assert_close(losses["loss"], model.loss(one)["loss"])
    words = model.generator.get_parameter("conditioner.transformer.tokens.weight")
    [found], [extra] = (torch.autograd.grad(loss, words) for loss in (losses["loss"], wanted))
    assert extra.any()
    torch.testing.assert_close(found, 0.5 * extra)  # of the flow itself, which begins as the identity, there is none


def test_it_is_trained_in_the_latents_of_an_autoencoder():
    autoencoder = kl()
    autoencoder.set_statistics(torch.full((4,), 0.5), torch.full((4,), 2.0))
    network = tarflow(in_channels=4, patch=1)
    model, one = flow_model(autoencoder=autoencoder, network=network, noise_std=0.3), batch(range(2))
    mean, logvar = autoencoder.posterior(model.images(one))
    noise = model.normal(one, "posterior", (4, 2, 2))
    wanted = (mean + (0.5 * logvar).exp() * noise - 0.5) / 2
    torch.testing.assert_close(model.latents(one, autoencoder), wanted)
    cached = {"latent_mean": (mean - 0.5) / 2, "latent_std": (0.5 * logvar).exp() / 2, **one}
    torch.testing.assert_close(model.latents(cached, autoencoder), wanted)
    model.loss(one)["loss"].backward()
    assert all(p.grad is None for p in autoencoder.parameters())
    assert any(p.grad is not None and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_std": None, "autoencoder": kl(), "network": tarflow(in_channels=4)}, "latents have no levels"),
        ({"noise_std": 0.0}, "without bounds: take 0.05, or null"),
        ({"noise_std": -1.0}, "model.noise_std=-1.0"),
    ],
)
def test_noise_that_makes_no_density_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        flow_model(**changes)


# --- a trained one, of points in the plane ---

CENTRES = torch.tensor([[-2.0, -1.0], [2.0, -1.0], [0.0, 2.0]])
SPREAD = 0.5
NOTHING = Conditioning(torch.zeros(1, 1, 8), torch.ones(1, 1).bool(), torch.zeros(1, 8))


def mixture() -> torch.distributions.MixtureSameFamily:
    parts = torch.distributions.Independent(torch.distributions.Normal(CENTRES, SPREAD), 1)
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(3)), parts)


def nats(network: nn.Module, points: Tensor) -> Tensor:
    fields: list[Any] = [t.expand(len(points), *t.shape[1:]) for t in (NOTHING.tokens, NOTHING.mask, NOTHING.pooled)]
    return -log_likelihood(*network(points[:, None, None], Conditioning(*fields))).mean()


def test_maximum_likelihood_fits_a_mixture_better_than_a_gaussian_does():
    """Between the best Gaussian's and the mixture's own, which nothing can be below but by luck."""
    torch.manual_seed(0)
    network = tarflow(in_channels=1, patch=1, width=16, num_blocks=3)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=100)
    for _ in range(100):
        optimizer.zero_grad()
        nats(network, mixture().sample((128,))).backward()
        optimizer.step()
        scheduler.step()
    points = mixture().sample((5000,))
    with torch.no_grad():
        found = nats(network, points)
    gaussian = torch.distributions.MultivariateNormal(points.mean(0), points.T.cov())
    best_gaussian, entropy = -gaussian.log_prob(points).mean(), -mixture().log_prob(points).mean()
    assert entropy - 0.02 < found < 0.5 * (best_gaussian + entropy)
