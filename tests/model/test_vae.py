import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from carrara.diffusion.likelihood import discretized_gaussian
from carrara.network.variational import Variational
from tests.tiny import RESOLUTION, awake, batch, batches, equal, pyramid, trainer, vae_model, weights

VALUES = 3 * RESOLUTION**2


def test_the_loss_is_the_bound_by_an_independent_route():
    """The same terms from torch.distributions, level by level."""
    model, one = vae_model(), batch(range(3))
    awake(model)
    losses = model.loss(one)
    network, conditioning = model.network, model.generator.conditioner(one["captions"])
    images = one["images"].float() / 127.5 - 1
    (mean, logvar), (prior_mean, prior_logvar) = network.posterior(images, conditioning), network.prior(conditioning)
    q, p = Normal(mean, (logvar / 2).exp()), Normal(prior_mean, (prior_logvar / 2).exp())
    torch.testing.assert_close(losses["kl"], kl_divergence(q, p).sum(1).mean() / VALUES, rtol=1e-4, atol=1e-6)
    z = q.mean + q.stddev * model.normal(one, "posterior", (4,))
    likelihood = Normal(network.generator(z, conditioning).double(), network.log_std.exp().double())
    edges = (torch.arange(257).double() - 128) * 2 / 255  # of the levels; the outer ones reach to infinity
    edges[0], edges[-1] = -math.inf, math.inf
    level = one["images"].long()
    mass = likelihood.cdf(edges[level + 1]) - likelihood.cdf(edges[level])
    torch.testing.assert_close(losses["reconstruction"].double(), -mass.log().mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(losses["loss"], losses["reconstruction"] + losses["kl"])
    torch.testing.assert_close(losses["bits_per_dim"], losses["loss"] / math.log(2))


def test_levels_have_all_the_mass_between_them():
    """bits_per_dim is of a distribution over the 256 levels: it sums to one."""
    levels = torch.arange(256) / 127.5 - 1
    mass = discretized_gaussian(levels, torch.tensor(0.3), torch.tensor(0.2)).exp().sum()
    assert mass.item() == pytest.approx(1, abs=1e-6)


def test_the_likelihoods_gradient_is_that_of_finite_differences():
    """In the mean and in the deviation, at the outer levels and far from the mean too."""
    x0 = torch.tensor([-1.0, -0.2, 0.3, 1.0, 1.0, -1.0], dtype=torch.float64)
    mean = torch.tensor([0.1, -0.25, 0.9, 0.95, -0.5, -1.2], dtype=torch.float64, requires_grad=True)
    std = torch.tensor(0.15, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, s: discretized_gaussian(x0, m, s), (mean, std))


def test_the_learned_deviation_finds_the_error_of_the_reconstruction():
    """Its optimum is the root mean square error (Rybkin et al. 2021, eq. 6), up to the levels' width."""
    torch.manual_seed(0)
    error = 0.2
    x0 = ((torch.rand(20_000) - 0.5) * 127.5).round() / 127.5
    mean = x0 + error * torch.randn(20_000)
    log_std = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log_std], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -discretized_gaussian(x0, mean, log_std.exp()).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert log_std.exp().item() == pytest.approx(error, rel=0.02)


class Linear(nn.Module):
    """z -> W z as a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.W = 0.1 * torch.randn(VALUES, 1)

    def forward(self, z: Tensor, conditioning: object) -> Tensor:
        return (z @ self.W.T).unflatten(1, (3, RESOLUTION, RESOLUTION))


def test_the_bound_lies_below_the_exact_log_likelihood_and_reaches_it():
    """A linear decoder of one latent: log p(picture) by adding up p(z) p(picture | z) over all z."""
    count, std = 501, 0.3
    model, linear = vae_model(network=Variational(pyramid(), noise_width=1, pooled_width=8)), Linear()
    network = model.network
    network.generator = linear  # type: ignore[assignment]
    nn.init.constant_(network.log_std, math.log(std))
    told = Normal(0.4, 1.2)  # the prior that the caption has
    told_mean, told_logvar = torch.full((count, 1), 0.4), torch.full((count, 1), 2 * math.log(1.2))
    network.prior = lambda conditioning: (told_mean, told_logvar)  # type: ignore[method-assign]
    levels = ((linear(torch.ones(1, 1), None)[0] + 1 + std * torch.randn(3, 8, 8)) * 127.5).round().clamp(1, 254)
    one = batch([0] * count) | {"images": levels.to(torch.uint8).expand(count, -1, -1, -1)}

    z = torch.linspace(-6, 8, 4001, dtype=torch.float64)
    likelihood = Normal(linear.W.T.double() * z[:, None], std)
    x = (levels.double() / 127.5 - 1).flatten()
    mass = likelihood.cdf(x + 1 / 255) - likelihood.cdf(x - 1 / 255)
    exact = (told.log_prob(z) + mass.log().sum(1)).logsumexp(0) + math.log(14 / 4000)

    # the posterior's noise evenly spread instead of drawn, so that the bound is known to 1e-3 nat
    quantiles = Normal(0.0, 1.0).icdf((torch.arange(count) + 0.5) / count)[:, None]
    model.normal = lambda batch, purpose, shape: quantiles  # type: ignore[method-assign]
    mean, logvar = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    network.posterior = lambda images, conditioning: (mean.expand(count, 1), logvar.expand(count, 1))  # type: ignore[method-assign]

    def gap() -> Tensor:
        return exact + VALUES * model.loss(one)["loss"].double()

    for m, v in ((0.0, 0.0), (1.0, 0.0), (2.0, -3.0), (1.0, -6.0)):
        with torch.no_grad():
            mean.fill_(m)
            logvar.fill_(v)
            assert gap() > 0.1
    optimizer = torch.optim.LBFGS([mean, logvar], lr=0.3, max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = gap()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert -2e-3 < gap().item() < 0.01


def test_the_noise_belongs_to_the_sample():
    model = vae_model()
    awake(model)
    alone = [float(model.loss(batch([k]))["loss"].detach()) for k in (4, 9)]
    assert model.loss(batch([4, 9]))["loss"].item() == pytest.approx(sum(alone) / 2, rel=1e-5)
    moved = batch([4])
    moved["positions"] += 1
    assert model.loss(moved)["loss"].item() != alone[0]


def test_the_captions_mean_adds_its_gradient_and_not_its_value():
    model, one = vae_model(caption_mean_weight=3.0), batch(range(4))
    losses = model.loss(one)
    torch.testing.assert_close(losses["loss"], losses["reconstruction"] + losses["kl"])
    assert "caption_mean" not in model.loss(one, torch.zeros(4))
    assert set(model.loss(one, torch.zeros(4))) == set(model.loss_names)
    (slope,) = torch.autograd.grad(losses["loss"], model.caption_mean.out.weight)  # type: ignore[union-attr]
    target = F.adaptive_avg_pool2d(model.images(one), 4)
    guess = model.caption_mean(model.generator.conditioner(one["captions"]))  # type: ignore[misc]
    wanted = torch.autograd.grad(3 * (guess - target).square().mean(), model.caption_mean.out.weight)  # type: ignore[union-attr]
    torch.testing.assert_close(slope, wanted[0])


def test_everything_learns(tmp_path):
    model = vae_model(caption_mean_weight=1.0)
    before = weights(model)
    trainer(tmp_path, max_steps=3, precision="bf16-mixed").fit(model, batches(3))
    after = weights(model)
    network = "generator.network."
    for part in ("generator", "encoder", "prior_net", "log_std"):
        names = [name for name in before if name.startswith(network + part)]
        assert names and not equal(before, after, names), part
