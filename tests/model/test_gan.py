import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.autoencoder.base import Autoencoder
from carrara.autoencoder.identity import Identity
from carrara.conditioner.text import Unconditional
from carrara.model.gan import GANModel, gradient_penalty
from carrara.network.conditioning import Conditioning
from tests.tiny import SGD, awake, batch, batches, equal, gan_model, kl, latent_gan_model, trainer, weights

# --- what a discriminator pays ---


def awake_gan(**changes: Any) -> GANModel:
    torch.manual_seed(0)
    model = gan_model(**changes)
    awake(model.discriminator)
    return model


def test_a_linear_discriminators_penalty_in_closed_form():
    """D(x) = w·x + b: both slopes are w, at every sample."""
    w, b = torch.randn(12, dtype=torch.float64, requires_grad=True), torch.tensor(3.0, dtype=torch.float64)
    real, fake = torch.randn(5, 3, 2, 2, dtype=torch.float64), torch.randn(5, 3, 2, 2, dtype=torch.float64)
    penalty = gradient_penalty(lambda x: x.flatten(1) @ w + b, real, fake)
    torch.testing.assert_close(penalty, 2 * w.square().sum().expand(5))
    (slope,) = torch.autograd.grad(penalty.mean(), w)
    torch.testing.assert_close(slope, 4 * w)  # differentiable itself


def test_a_quadratic_discriminators_penalties_are_each_samples_own():
    """D(x) = a|x|²/2: |∇D|² = a²|x|², of the real and of the generated pictures alike."""
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    real, fake = torch.randn(4, 6, dtype=torch.float64), 3 * torch.randn(4, 6, dtype=torch.float64)
    penalty = gradient_penalty(lambda x: a * x.square().sum(1) / 2, real, fake)
    moments = real.square().sum(1) + fake.square().sum(1)
    torch.testing.assert_close(penalty, a**2 * moments)
    (slope,) = torch.autograd.grad(penalty.sum(), a)
    torch.testing.assert_close(slope, 2 * a * moments.sum())


def test_pictures_that_pay_are_not_changed():
    real, fake = torch.randn(2, 3), torch.randn(2, 3)
    gradient_penalty(lambda x: x.square().sum(1), real, fake)
    assert not real.requires_grad and not fake.requires_grad


def test_a_share_of_the_samples_pays_for_all():
    """Each the same one in any batch, and as much as all in the mean; a batch without one pays nothing."""
    model = awake_gan(penalty_share=0.25)
    alone = [float(model.loss(batch([k]))["penalty"].detach()) for k in range(64)]
    assert 8 <= sum(value > 0 for value in alone) <= 24
    together = model.loss(batch(range(64)))["penalty"]
    assert together.item() == pytest.approx(sum(alone) / 64, rel=1e-4)
    everyone = awake_gan(penalty_share=1.0)
    whole = [float(everyone.loss(batch([k]))["penalty"].detach()) for k in range(64)]
    for one, paid in zip(whole, alone, strict=True):
        assert paid == 0 or paid == pytest.approx(4 * one, rel=1e-4)
    nobody = batch([alone.index(0.0)])
    losses = model.loss(nobody)
    torch.testing.assert_close(losses["loss"], losses["generator"] + losses["discriminator"])


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share: float):
    with pytest.raises(ValueError, match=r"model.penalty_share must lie in \(0, 1\]"):
        gan_model(penalty_share=share)


def test_logits_are_told_apart_under_autocast():
    """Closer ones than bfloat16 has numbers for: its step near 100 is 0.5."""
    model, one = gan_model(), batch([0])
    with torch.no_grad():
        model.discriminator.out.bias.fill_(100.0)  # type: ignore[union-attr, operator]
    told, x = model.generator.conditioner(one["captions"]), model.images(one)
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.cat([model.discriminator(x + 0.02 * k, told) for k in range(8)])
    assert logits.dtype == torch.float32 and len(logits.unique()) == 8


@pytest.mark.parametrize("autocast", [False, True])
def test_the_penalty_of_the_real_network_is_that_of_finite_differences(autocast: bool):
    """In float32 with attention, under bfloat16 autocast too: the directional derivative of every logit."""
    model, one = gan_model(), batch(range(3))
    for parameter in model.discriminator.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        penalty = model.loss(one)["penalty"]
        noise = model.normal(one, "noise", (4,))
        told = model.generator.conditioner(one["captions"])
        fake = model.generator.network(noise, told).float().detach()
    judge, total = model.discriminator.double(), 0.0
    steps = 1e-5 * torch.eye(192, dtype=torch.float64).view(192, 3, 8, 8)
    for pictures in (model.images(one).double(), fake.double()):
        for k, picture in enumerate(pictures):
            told_k = Conditioning(
                *(
                    x[k : k + 1].expand(192, *x.shape[1:])
                    for x in (told.tokens.double(), told.mask, told.pooled.double())
                )
            )
            slope = (judge(picture + steps, told_k) - judge(picture - steps, told_k)) / 2e-5
            total += slope.square().sum().item() / len(pictures)
    assert penalty.item() == pytest.approx(total, rel=2e-2 if autocast else 1e-3)
    judge.float()
    penalty.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# --- two players, one step ---


def gradients(module: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


def test_the_loss_is_that_of_both_players():
    model, one = gan_model(gradient_penalty=0.3), batch(range(4))
    losses = model.loss(one)
    conditioning = model.generator.conditioner(one["captions"])
    fake = model.generator.network(model.normal(one, "noise", (4,)), conditioning)
    on_real = model.discriminator(model.images(one), conditioning)
    on_fake = model.discriminator(fake, conditioning)
    torch.testing.assert_close(losses["generator"], F.softplus(on_real - on_fake).mean())
    torch.testing.assert_close(losses["discriminator"], F.softplus(on_fake - on_real).mean())
    total = losses["generator"] + losses["discriminator"] + 0.15 * losses["penalty"]
    torch.testing.assert_close(losses["loss"], total)


def test_both_play_in_the_latents_of_an_autoencoder():
    """The loss of a picture is that of its latents without one; and the auto-encoder does not learn."""
    autoencoder = kl()
    autoencoder.set_statistics(torch.full((4,), 0.5), torch.full((4,), 2.0))
    model, one = latent_gan_model(autoencoder), batch(range(4))
    awake(model.generator)
    losses = model.loss(one)
    latents = model.latents(one, autoencoder)
    conditioning = model.generator.conditioner(one["captions"])
    fake = model.generator.network(model.normal(one, "noise", (4,)), conditioning)
    on_real, on_fake = (model.discriminator(x, conditioning) for x in (latents, fake))
    torch.testing.assert_close(losses["generator"], F.softplus(on_real - on_fake).mean())
    cached = {key: value for key, value in one.items() if key != "images"} | {
        "latent_mean": latents, "latent_std": torch.zeros_like(latents), "tokens": conditioning.tokens.detach(),
        "mask": conditioning.mask, "pooled": conditioning.pooled.detach(),
    }  # fmt: skip
    torch.testing.assert_close(model.loss(cached)["generator"], losses["generator"])
    assert model.takes_latents
    losses["loss"].backward()
    assert not any(p.requires_grad for p in autoencoder.parameters())
    assert torch.equal(model.decode(fake), autoencoder.decode(fake)) and model.decode(fake).shape == (4, 3, 8, 8)


def test_each_player_learns_from_its_own_loss_alone():
    model, one = gan_model(optimizer=SGD), batch(range(4))
    for name, player, other in (
        ("generator", model.generator, model.discriminator),
        ("discriminator", model.discriminator, model.generator),
        ("penalty", model.discriminator, model.generator),
    ):
        model.zero_grad()
        model.loss(one)[name].backward()
        assert any(g.any() for g in gradients(player)), name
        assert not any(g.any() for g in gradients(other)), name


def test_the_generators_gradient_raises_the_logits_of_its_pictures():
    model, one = gan_model(optimizer=SGD), batch(range(8))

    def logits() -> Tensor:
        conditioning = model.generator.conditioner(one["captions"])
        fake = model.generator.network(model.normal(one, "noise", (4,)), conditioning)
        return model.discriminator(fake, conditioning).mean()

    before = logits()
    model.loss(one)["generator"].backward()
    with torch.no_grad():
        for parameter in model.generator.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    assert logits() > before


def test_the_noise_belongs_to_the_sample():
    model = gan_model()
    awake(model.generator)
    alone = [float(model.loss(batch([k]))["generator"].detach()) for k in (4, 9)]
    assert model.loss(batch([4, 9]))["generator"].item() == pytest.approx(sum(alone) / 2, rel=1e-5)
    moved = batch([4])
    moved["positions"] += 1
    assert model.loss(moved)["generator"].item() != alone[0]


def test_validation_has_no_loss():
    model = gan_model()
    assert model.loss(batch(range(2)), torch.zeros(2)) == {} and model.loss_names == ()


def test_the_captions_mean_teaches_the_text_and_no_player():
    model, one = gan_model(caption_mean_weight=2.0, optimizer=SGD), batch(range(4))
    losses = model.loss(one)
    plain = losses["generator"] + losses["discriminator"] + 0.25 * losses["penalty"]
    torch.testing.assert_close(losses["loss"], plain)  # its gradient is added, and not its value
    head = model.caption_mean.out.weight  # type: ignore[union-attr]
    of_loss, of_error = (
        torch.autograd.grad(losses[name], head, retain_graph=True) for name in ("loss", "caption_mean")
    )
    torch.testing.assert_close(of_loss[0], 2 * of_error[0])
    losses["caption_mean"].backward()
    assert any(g.any() for g in gradients(model.generator.conditioner))
    for player in (model.generator.network, model.discriminator):
        assert not any(g.any() for g in gradients(player))


def test_a_batch_is_one_step_of_both_players(tmp_path):
    model = gan_model(caption_mean_weight=1.0)
    before = weights(model)
    run = trainer(tmp_path, max_steps=2, precision="bf16-mixed")
    run.fit(model, batches(2))
    assert run.global_step == 2
    after = weights(model)
    for part in ("generator.network.", "generator.conditioner.", "discriminator.", "caption_mean."):
        names = [name for name in before if name.startswith(part) and before[name].is_floating_point()]
        assert names and not equal(before, after, names)


@pytest.mark.parametrize("change", [{"player_betas": (2.0, 0.9)}, {"text_learning_rate": -1.0}])
def test_impossible_steps_are_refused(change):
    with pytest.raises(ValueError, match="must lie in"):
        gan_model(**change)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_players_take_steps_of_adamw_and_the_text_muons(weight: float):
    """Each group with its own learning rate, which the schedule scales; everything that is trained is in one group."""
    model = gan_model(caption_mean_weight=weight, player_betas=(0.3, 0.8), text_learning_rate=0.5, warmup_steps=1)
    optimizer = model.configure_optimizers()["optimizer"]
    named = {id(p): name for name, p in model.named_parameters()}
    stepped = [named[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(stepped) == sorted(named.values())
    for group in optimizer.param_groups:
        names = {named[id(p)] for p in group["params"]}
        if any(name.startswith(("generator.network.", "discriminator.")) for name in names):
            assert all(name.startswith(("generator.network.", "discriminator.")) for name in names)
            assert not group["muon"] and group["betas"] == (0.3, 0.8) and group["lr"] == 0.5 * 1e-3
        else:
            assert group["lr"] == 0.5 * 0.5 and group["betas"] == (0.9, 0.99)
    assert any(group["muon"] and group["params"] for group in optimizer.param_groups)


# --- it learns a distribution ---


class Points(GANModel):
    """Two-dimensional points instead of pictures."""

    def latents(self, batch: dict[str, Any], autoencoder: Autoencoder) -> Tensor:
        return batch["images"]


class PointGenerator(nn.Module):
    noise_shape = (4,)

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(4, 2)

    def forward(self, noise: Tensor, conditioning: Conditioning) -> Tensor:
        return self.layers(noise)


class PointDiscriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(2, 1)

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        return self.layers(x).squeeze(1)


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, outputs)
    )


def ring(count: int, generator: torch.Generator) -> Tensor:
    """(count, 2): eight Gaussians of standard deviation 0.05 on the unit circle."""
    angles = 2 * math.pi / 8 * torch.randint(8, (count,), generator=generator)
    return torch.stack([angles.cos(), angles.sin()], 1) + 0.05 * torch.randn(count, 2, generator=generator)


@pytest.mark.slow
def test_all_modes_of_a_mixture_are_found():
    """Eight modes, each within a factor of two of its share, and few points far from all of them."""
    generator = torch.Generator().manual_seed(0)
    model = Points(
        PointGenerator(),  # type: ignore[arg-type]
        Unconditional(8),
        PointDiscriminator(),
        Identity(),
        gradient_penalty=0.1,
        penalty_share=1.0,
        caption_mean_weight=0.0,
        player_betas=(0.0, 0.99),
        text_learning_rate=1e-3,
        optimizer=lambda groups: torch.optim.Adam(groups, lr=1e-3),
        warmup_steps=0,
        cooldown=0.5,
        max_steps=3000,
        seed=0,
    )
    configured = model.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]

    def steps() -> Iterator[dict[str, Any]]:
        for step in range(3000):
            positions = torch.arange(128 * step, 128 * (step + 1))
            yield {"images": ring(128, generator), "captions": [""] * 128, "positions": positions}

    for one in steps():
        optimizer.zero_grad()
        model.loss(one)["loss"].backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        made = model.generator.network(torch.randn(4000, 4, generator=generator), model.generator.conditioner([""]))
    modes = torch.stack([torch.tensor([math.cos(a), math.sin(a)]) for a in torch.arange(8) * 2 * math.pi / 8])
    distance, nearest = torch.cdist(made, modes).min(1)
    share = torch.bincount(nearest[distance < 0.2], minlength=8) / len(made)
    assert share.min() > 0.125 / 2 and share.max() < 0.125 * 2
    assert share.sum() > 0.7
